"""A cohort shared among workers: shards, processes of this machine, a Ray cluster."""
