"""Credit methods, one a file: what turns rewards and signals into one number for each token the policy chose."""
