"""The initial weights do what they are laid out for."""

import torch

from magicpig.pocket import model


def _net(vocabulary=600):
    net = model.make(vocabulary, hidden=256, intermediate=64, heads=4, groups=2)
    model.initialise(net, seed=0)
    net.set_attn_implementation("eager")
    return net.eval()


def test_layer_0_looks_back_a_fixed_distance_even_far_into_a_text():
    ids = torch.randint(3, 600, (1, 700), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attention = _net()(ids, output_attentions=True).attentions[0][0]
    at = torch.arange(20, 700)
    for head, back in enumerate((1, 3, 2, 5)):
        assert (attention[head, at].argmax(1) == at - back).float().mean() > 0.95
        assert attention[head, at, at - back].mean() > 0.5


def test_layer_1_finds_what_followed_the_same_words_before():
    text = torch.randint(3, 600, (300,), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([text, text[100:160]])[None]
    with torch.no_grad():
        attention = _net()(ids, output_attentions=True).attentions[1][0, 0]
    at = torch.arange(305, 359)
    assert (attention[at].argmax(1) == at - 200 + 1).float().mean() > 0.8


def test_weights_are_the_same_for_the_same_seed():
    first, second = _net().state_dict(), _net().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
