"""Plain data and exceptions that several processes share. Imports none of the other rooms but config."""
