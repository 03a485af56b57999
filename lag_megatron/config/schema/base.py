"""What every part of the configuration shares."""

FORBID = {"extra": "forbid"}
