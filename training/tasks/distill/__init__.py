"""A student with registers learns a teacher's patches."""
