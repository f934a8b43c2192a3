"""The studies of the project itself. Nothing in the package imports them, and the wheel does not contain them."""
