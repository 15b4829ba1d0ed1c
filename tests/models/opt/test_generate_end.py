"""Where generation ends."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from generate_support import CONFIG, NEW, generate_module, logits_of, make_model

from flashjax.models import opt
from flashjax.models.opt import generation_request


class TestEnd:
    """Stopping at end tokens."""

    @pytest.fixture
    def free(self, model):
        """Prompts, and what the model says to them without an end token."""
        ids = np.array([[7, 8, 9, 10, 11, 12], [9, 9, 3, 4, 5, 6], [8, 0, 0, 0, 5, 9]])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=-1)
        return ids, np.asarray(out)[:, 6:]

    def _cut(self, new, ends):
        expected = new.copy()
        for row in expected:
            where = np.flatnonzero(np.isin(row, ends))
            if where.size:
                row[where[0] + 1 :] = CONFIG.pad_token_id
        return expected

    @pytest.mark.parametrize("at", [0, 1, 4, NEW - 1])
    def test_rows_are_padded_after_their_end(self, model, free, at):
        ids, new = free
        end = int(new[0, at])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=end)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, [end]))

    @pytest.mark.parametrize("kind", [list, tuple, np.array])
    def test_several_ends(self, model, free, kind):
        ids, new = free
        ends = kind([int(new[0, 3]), int(new[1, 2])])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, ends))

    def test_none_takes_the_configuration(self, free):
        ids, new = free
        ends = (int(new[0, 2]), int(new[1, 4]))
        other = make_model(eos_token_id=ends)
        out = opt.generate(other, ids, max_new_tokens=NEW)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, ends))
        found = generation_request._end_tokens(CONFIG, None)
        assert np.flatnonzero(found).tolist() == [CONFIG.eos_token_id]

    def test_no_end(self, model, free):
        ids, new = free
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(out[:, 6:], new)
        for own in (None, 1000):
            config = dataclasses.replace(CONFIG, eos_token_id=own)
            assert not generation_request._end_tokens(config, None).any()

    @pytest.mark.parametrize("pad", [None, -1, 1000])
    def test_without_padding_token_rows_are_filled_with_an_end(self, free, pad):
        ids, new = free
        end = int(new[0, 0])
        other = make_model(pad_token_id=pad)
        out = opt.generate(other, ids, max_new_tokens=NEW, eos_token_id=end)
        assert (np.asarray(out)[0, 6:] == end).all()

    def test_the_loop_ends_with_the_last_row(self, model, free, monkeypatch):
        states = []
        decode = generate_module._decode

        def spy(*args, **kwargs):
            result = decode(*args, **kwargs)
            states.append(result[0])
            return result

        monkeypatch.setattr(generate_module, "_decode", spy)
        ids, new = free
        ends = new[:, 2].tolist()
        cut = self._cut(new, ends)
        steps = int((cut != CONFIG.pad_token_id).sum(axis=1).max())
        assert steps < NEW
        opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        assert [int(s.step) for s in states] == [steps]
        streamed = list(
            opt.generate_stream(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        )
        np.testing.assert_array_equal(np.stack(streamed, axis=1), cut[:, :steps])

    def test_min_new_tokens(self, model, free):
        ids, new = free
        end = int(new[1, 0])
        for minimum in (0, 1, 3, NEW):
            options = {"max_new_tokens": NEW, "min_new_tokens": minimum}
            out = opt.generate(model, ids, eos_token_id=end, **options)
            out = np.asarray(out)[:, 6:]
            assert (out[:, :minimum] != end).all()
            if minimum == 0:
                np.testing.assert_array_equal(out, self._cut(new, [end]))
            else:
                # The best token but the end, and nothing else is touched.
                logits = np.array(logits_of(model, jnp.asarray(ids))[:, -1])
                logits[:, end] = -np.inf
                np.testing.assert_array_equal(out[:, 0], logits.argmax(axis=-1))

    def test_finished_rows_leave_the_others_alone(self, model, free):
        ids, new = free
        # An end for the first row only.
        end = next(int(t) for t in new[0] if t not in new[1])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=end)
        np.testing.assert_array_equal(out[1, 6:], new[1])
