"""Making aggregator weights for AFA: ``cache`` a data set, ``train`` on it, ``evaluate`` the result."""
