"""Measurements that anybody can repeat: `magicpig bench`."""
