"""A server that speaks OpenAI's protocol: chat and completions, one prompt at a time, as long as the memory allows.

`settings` says what is served and where, `requests` turns a request into token ids, `worker` answers them in order on
one thread, `text_stream` turns tokens into text up to a stop string, `app` has the routes, `serve` starts it all.
"""
