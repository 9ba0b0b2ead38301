"""On the path of the programs that the tests start, so that they compute as the tests do; see tests/processors.py."""

import processors

processors.from_environment()
