"""Configuration files that earlier versions wrote."""

from unrote.versions import Step

STEPS: tuple[Step, ...] = ()
"""What makes a file of the next version of one of version 1, 2, …

None was needed yet: no key was ever renamed, removed or given another meaning, and what is new has a default that does
what was done before it. Whoever does either adds the step here, which is what makes a new version.
"""

CONFIG_VERSION = len(STEPS) + 1
"""Of the fields' names and meanings, in files; a file without ``version`` has 1."""
