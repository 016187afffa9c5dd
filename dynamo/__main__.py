"""`python -m dynamo` is the command `dynamo`."""

import sys

from dynamo.cli.main import main

sys.exit(main())
