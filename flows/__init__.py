"""The shell around the library: files in, sage, files out; one file for each outside tool."""
