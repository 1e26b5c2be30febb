"""From a command to a job: templates of batch scripts, and the launcher that renders them."""
