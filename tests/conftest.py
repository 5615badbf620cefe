"""Set-up of the pass tests."""

import logging

# Dynamo's structured trace is meant for a file; pytest would keep every record of every graph.
logging.getLogger("torch.__trace").propagate = False
