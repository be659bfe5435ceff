"""The service under load: too many requests, clients that do not read, a thousand sessions, slow networks."""
