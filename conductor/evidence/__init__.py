"""What makes a finished run believable to a person who was not there: seal, verify, bundle."""
