"""From a prompt with pictures to an answer."""
