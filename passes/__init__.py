"""Graph passes on the Dynamo graph: one file a pass, listed in order in `pipeline`."""
