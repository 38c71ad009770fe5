"""`python -m mhla_gen.cli`, the same as `mhla-gen`."""

import sys

from mhla_gen.cli import main

sys.exit(main())
