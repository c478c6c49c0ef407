"""The methods, one file each: pure tensor code, no host, no I/O."""
