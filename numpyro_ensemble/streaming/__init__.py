"""Calls that are cut by draws and by rows, block by block into a Zarr store."""
