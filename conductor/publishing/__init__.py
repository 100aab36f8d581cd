"""From an accepted release to one revision of a repository on the Hub, or to a refusal."""
