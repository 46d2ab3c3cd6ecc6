import pytest
import torch
from transformers import LlamaForCausalLM

from magicpig.config import Config
from magicpig.integrations.transformers import MagicPigCache, attach, detach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.studies.evaluation.answer import answers, read_document
from magicpig.studies.evaluation.matrix import PROTOCOLS, Method, parse_methods

SOME = Config(K=4, L=30, exact_below=0, dense_layers=())
EVERYTHING = Config(K=1, L=64, min_hits=1, exact_below=0, dense_layers=())


@pytest.fixture(scope="module")
def network(model_dir):
    return LlamaForCausalLM.from_pretrained(model_dir, local_files_only=True).eval()


@pytest.fixture
def attached(network):
    yield attach(network, Config(sampler="full"))
    detach(network)


def tokens(count, seed=0):
    return torch.randint(2, 5000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


CONTEXT, QUESTION = tokens(600), tokens(40, 1)


def ask(network, protocol, *methods, context=CONTEXT, new_tokens=12, stop=(), **options):
    runs = [(protocol, Method("", method)) for method in methods]
    document = read_document(network, context, **options)
    given = answers(network, document, QUESTION, runs, new_tokens=new_tokens, stop=stop)
    return [answer.token_ids for answer in given]


def greedy(network, cache=None, new_tokens=12):
    prompt = torch.tensor([CONTEXT + QUESTION])
    output = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **cache_argument(cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, prompt.shape[1] :].tolist()


def test_full_attention_is_that_of_transformers_alone(network):
    expected = greedy(network)
    attach(network)
    for protocol in PROTOCOLS:
        assert ask(network, protocol, Config(sampler="full")) == [expected]
    detach(network)


@pytest.mark.parametrize("method", [SOME, Config(exact_below=0), EVERYTHING], ids=["some", "default", "everything"])
def test_question_dense_is_what_generate_does(method, network, attached):
    expected = greedy(network, MagicPigCache(network.config, method))
    assert ask(network, "question-dense", method, chunk=100) == [expected]


def test_sampling_everything_is_exact(attached):
    for protocol in PROTOCOLS:
        full, everything = ask(attached, protocol, Config(sampler="full"), EVERYTHING)
        assert everything == full


def test_answers_do_not_depend_on_other_runs(attached):
    methods = [method.config for method in parse_methods("lsh:K=4,L=30,full,window,lsh:K=6,L=30", exact_below=0)]
    for protocol in PROTOCOLS:
        together = ask(attached, protocol, *methods)
        assert together == [ask(attached, protocol, method)[0] for method in methods]
        assert ask(attached, protocol, *reversed(methods)) == together[::-1]


@torch.inference_mode()
def test_a_sparse_question_is_decoded_token_by_token(attached):
    cache = MagicPigCache(attached.config, SOME)
    attached(torch.tensor([CONTEXT]), **cache_argument(cache))
    for token in QUESTION:
        logits = attached(torch.tensor([[token]]), **cache_argument(cache)).logits
    expected = []
    for _ in range(12):
        expected.append(int(logits[0, -1].argmax()))
        logits = attached(torch.tensor([expected[-1:]]), **cache_argument(cache)).logits
    assert ask(attached, "question-sparse", SOME) == [expected]
    assert ask(attached, "question-dense", SOME) != [expected]


def test_an_answer_ends_at_its_stop_token(attached):
    (whole,) = ask(attached, "question-dense", SOME)
    stop = whole[4]
    (cut,) = ask(attached, "question-dense", SOME, stop={stop})
    assert cut == whole[: whole.index(stop) + 1]


def test_one_token_is_never_sampled_when_the_question_is_dense(attached):
    runs = [(protocol, Method("", SOME)) for protocol in PROTOCOLS]
    dense, sparse = answers(attached, read_document(attached, CONTEXT), QUESTION, runs, new_tokens=1, stop=())
    assert dense.cache.sampled_share_mean is None
    assert 0 < sparse.cache.sampled_share_mean < 1


def test_a_document_is_read_once_for_all_questions(attached):
    seen = []
    document = read_document(attached, CONTEXT, chunk=200, on_chunk=seen.append)
    assert seen == [200, 200, 200]
    runs = [(protocol, Method("", config)) for protocol in PROTOCOLS for config in (SOME, Config(sampler="full"))]
    first = [answer.token_ids for answer in answers(attached, document, QUESTION, runs, new_tokens=5, stop=())]
    list(answers(attached, document, tokens(30, 3), runs, new_tokens=5, stop=()))
    again = [answer.token_ids for answer in answers(attached, document, QUESTION, runs, new_tokens=5, stop=())]
    assert first == again
    assert document.report().tokens == len(CONTEXT)
