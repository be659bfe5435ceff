"""What runs Outrider on a cluster: the Helm chart, and the tools that build and check it."""
