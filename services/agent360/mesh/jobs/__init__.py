"""Jobs over files: long runs that survive a crash."""
