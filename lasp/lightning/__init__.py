"""Lightning attention: the operator, its two implementations and its oracle."""
