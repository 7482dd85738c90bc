"""ultralong: extend a language model's window from 128K to 4M tokens, and see each step.

The rooms, in the order a document passes through them: `ultralong.data` (documents, tokens, packed rows),
`ultralong.attention` (sequence-parallel attention), `ultralong.training` (one loop), `ultralong.checkpoints.extend`
(the checkpoint
with the longer window) and `ultralong.evaluation`. Nothing is imported here, so that `import ultralong` stays instant.
"""

__version__ = "0.3.0"
