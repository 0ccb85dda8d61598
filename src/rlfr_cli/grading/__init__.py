"""Answer extraction, math-verify in killable processes, outcome rewards, statistics of results."""
