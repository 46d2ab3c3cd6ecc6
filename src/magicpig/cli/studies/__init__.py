"""The commands of `magicpig.studies`."""
