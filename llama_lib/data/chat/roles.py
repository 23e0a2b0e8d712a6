"""What a token of a conversation belongs to, as one byte beside each id.

Invariant: the numbers are stored with encoded conversations, so they never change their meaning.
"""

# TEMPLATE is what the chat template writes around the turns: BOS, headers, blanks. ASSISTANT is
# all that the model has to write, its end token included. TEXT is a document without turns.
# UNTRAINED are turns that their record says not to train on, whatever the options say.
TEMPLATE, ASSISTANT, USER, SYSTEM, TEXT, UNTRAINED = range(6)

# Of a turn, by the name it has in a message.
ROLE_NUMBERS = {"assistant": ASSISTANT, "user": USER, "system": SYSTEM}
ROLE_NAMES = ("template", "assistant", "user", "system", "text", "untrained")
