"""One model over several processes of a machine, a shard in each: rank 0 serves, the others follow its steps."""
