"""`python -m dynamo` is the command `dynamo`, and imports what that would: not from the current directory by itself."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from dynamo.cli.main import main

sys.exit(main())
