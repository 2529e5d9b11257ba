"""What a config costs before anything is loaded: parameters and bytes."""
