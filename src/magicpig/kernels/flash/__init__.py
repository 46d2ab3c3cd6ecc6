"""The verb attend_many: exact attention of many queries, as of a prompt."""
