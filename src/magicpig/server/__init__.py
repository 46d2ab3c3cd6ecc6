"""A server with OpenAI's interface around an engine: HTTP, JSON and streams on one side, requests on the other.

`app.py` lists the routes; `protocol.py` is what clients send; `answers.py` what they get.
"""
