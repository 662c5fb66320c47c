"""Special token ids, those of the published models."""

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
