"""What every part shares: values, errors, configuration, wire conversion, the session store, rpc plumbing."""
