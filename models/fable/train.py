"""Make Fable, the small demonstration model of the Phi-3 architecture.

One script does everything: it trains the tokenizer, builds the data, trains the model (and resumes
after an interruption), writes a Hugging Face folder in bfloat16 and records what the reference
implementation (transformers) says about that folder.

    python train.py all    --train train.txt --valid valid.txt --work build --out fable
    python train.py sample --work build --prompt "Once upon a time"

The stages `tokenizer`, `train`, `export` and `golden` can also be run one by one, in this order.
`train` continues from `<work>/checkpoint.pt` if that file exists.
"""

import argparse
import json
import math
import os
import random
import re
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SEED = 20240607

# ---------------------------------------------------------------------------------------------
# Shape of the model and of the run
# ---------------------------------------------------------------------------------------------

VOCAB = 4096
HIDDEN = 256
INTERMEDIATE = 512
LAYERS = 5
HEADS = 8
KV_HEADS = 4
HEAD_DIM = HIDDEN // HEADS
EPS = 1e-5
THETA = 10000.0
ORIGINAL_CONTEXT = 512  # up to here the short factors of LongRoPE hold
CONTEXT = 1024  # and up to here the long ones
SHORT_FACTOR = [1.0] * (HEAD_DIM // 2)
LONG_FACTOR = [round(2.0 ** (i / (HEAD_DIM // 2 - 1)), 4) for i in range(HEAD_DIM // 2)]

STEPS = 1845
FIRST_STEPS, FIRST_BATCH_TOKENS = 100, 8192
BATCH_TOKENS = 4096  # after the first steps
WARMUP_STEPS = 60
DECAY_FROM = 0.4  # share of the run after which the learning rate falls linearly to zero
FINISH_FROM = 0.78  # share of the run after which every third step uses windows of CONTEXT tokens
CHAT_SHARE, FINISH_CHAT_SHARE = 1 / 8, 3 / 8  # share of the windows that are made of conversations, before and after that
MUON_LR, MUON_DECAY = 0.02, 0.1
ADAM_LR, ADAM_DECAY = 0.004, 0.02

# ---------------------------------------------------------------------------------------------
# Tokenizer: byte-pair encoding as SentencePiece does it, laid out like Phi-3's tokenizer.json
# ---------------------------------------------------------------------------------------------

# Added after the ordinary pieces, in the order (and with the gaps filled) of Phi-3's own list.
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
           "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
BASE_VOCAB = VOCAB - len(SPECIAL)
ENDOFTEXT, ASSISTANT, SYSTEM, END, USER = (BASE_VOCAB + SPECIAL.index(f"<|{n}|>")
                                           for n in ("endoftext", "assistant", "system", "end", "user"))
BOS = 1

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def added_tokens():
    """Every added token with Phi-3.5-mini's flags: (id, content, rstrip, special)."""
    rows = [(0, "<unk>", False, True), (1, "<s>", False, True), (2, "</s>", True, False)]
    return rows + [(BASE_VOCAB + i, t, t != "<|endoftext|>", True) for i, t in enumerate(SPECIAL)]


def train_tokenizer(text):
    """Learn the merges on words, then assemble a tokenizer that needs no word splitting."""
    # Pieces never span a space, a line break, or the border between letters and other characters,
    # so that the finished tokenizer finds the same pieces without a pre-tokenizer.
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split(
        pattern=Regex(r"\u2581?[A-Za-z]+|\u2581?[^A-Za-z\u2581\n]+|\u2581|\n"), behavior="isolated")
    alphabet = sorted(set(text) - {"\n", " "})
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    head = ["<unk>", "<s>", "</s>"] + bytes_
    size = BASE_VOCAB - len(head)
    learner.train_from_iterator(
        ("\u2581" + line for line in text.split("\n") if line),
        trainers.BpeTrainer(vocab_size=size + 1, min_frequency=2, initial_alphabet=alphabet + ["\u2581"],
                            show_progress=False, special_tokens=["<unk>"]))
    learnt = json.loads(learner.to_str())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in learnt["merges"]]
    # SentencePiece's order: control tokens, bytes, merged pieces by rank, single characters last.
    single = [t for t in learnt["vocab"] if len(t) == 1]
    pieces = ["".join(m) for m in merges]
    assert len(set(pieces)) == len(pieces)
    vocab = {t: i for i, t in enumerate(head + pieces + single)}
    assert len(vocab) == BASE_VOCAB, len(vocab)

    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in merges], unk_token="<unk>",
                               fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)])
    for id_, content, rstrip, special in added_tokens():
        token = AddedToken(content, rstrip=rstrip, normalized=False, special=special)
        (tok.add_special_tokens if special else tok.add_tokens)([token])
        assert tok.token_to_id(content) == id_
    return tok


def encode(tok, text):
    return tok.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------
# Data: plain stories, and conversations derived from them
# ---------------------------------------------------------------------------------------------

NOUNS = """king queen prince princess emperor giant dwarf witch wizard magician fairy ogre ogress dragon troll mermaid
elf goblin ghost monster knight soldier robber thief hunter huntsman fisherman miller tailor shoemaker blacksmith
merchant farmer peasant shepherd woodcutter cook gardener servant maid nurse beggar hermit priest judge doctor sailor
captain musician goldsmith innkeeper landlord widow stepmother grandmother grandfather mother father brother sister
son daughter boy girl child baby lad youth maiden bride bridegroom woman man lady gentleman stranger fool
fox wolf bear lion tiger hare rabbit mouse rat cat dog puppy donkey ass horse mare foal cow ox bull calf goat kid sheep lamb
pig stag deer reindeer monkey jackal elephant hedgehog frog toad snake serpent turtle tortoise crab fish flounder salmon
whale shark bird raven crow eagle owl dove pigeon sparrow swallow nightingale stork swan goose duck hen cock rooster
magpie wren bee ant spider fly beetle butterfly caterpillar
castle palace tower cottage hut inn church mill kitchen garden forest wood tree river lake sea brook well fountain
island mountain hill valley cave village city kingdom road bridge ship boat carriage stable cellar
ring crown sword axe knife spindle needle mirror lamp key box chest sack purse gold silver treasure diamond pearl
apple pear cake bread porridge egg rose flower seed bean feather shoe slipper cloak coat hat shirt stick whistle fiddle
flute harp bell clock letter book riddle wish dream spell wedding feast battle storm snow winter moon star sun wind
fire glass stone nut bone candle drum pipe basket pot kettle bottle rope wheel mill""".split()
NOUNS = sorted(set(NOUNS))
NOUN_RE = re.compile(r"\b(" + "|".join(NOUNS) + r")\b", re.I)
NOT_NAMES = set("""i the a an and but so then when he she it they we you his her my your our no yes oh o ah well now here there
what who why how where if in on at to of for with from by as is was not all one two three let come go do king queen prince
princess god lord sir lady heaven mr mrs majesty highness christmas sunday english irish german french spanish christian
old king's queen's note see p st page dr source parallels""".split())
OPENING = re.compile(
    r"^(ONCE|Once|THERE (was|were|lived)|There (was|were|lived)|LONG|Long ago|A long|MANY|Many years|IN (the|a|old|times)|"
    r"In (old|a certain|the (days|time)|times)|A (certain|poor|rich|king|man|farmer|miller|soldier)|An old|"
    r"One (day|morning|evening|night|fine)|Some)\b")
NOTES = re.compile(r"^(Source|Parallels|Remarks|Note)|l\.c\.|See (also|note)|Kletke|folk-lore|Folk-Lore|variant|version", re.M)

ASK = ["Tell me a story about {}.", "Tell me a story about {}.", "Tell me a story about {}.", "Tell me a tale about {}.",
       "Tell me a fairy tale about {}.", "Please tell me a story about {}.", "Please tell me a fairy tale about {}.",
       "Can you tell me a story about {}?", "Could you tell me a story with {}?", "Write a story about {}.",
       "Write a fairy tale about {}.", "Write me a story with {}.", "I want to hear a story about {}.",
       "A story about {}, please.", "I would like a tale about {}.", "Do you know a story about {}?",
       "tell me a story about {}", "story about {}", "Tell a story about {}.", "Once more, a story about {}!"]
ASK_ANY = ["Tell me a story.", "Tell me a story.", "Tell me a fairy tale.", "Please tell me a story.", "Tell me a tale.",
           "Can you tell me a story?", "A story, please.", "Write a story.", "Tell me another story.", "Another one, please.",
           "I would like to hear a story.", "Do you know a story?", "tell me a story"]
SYSTEM_LINES = ["You are a helpful assistant.", "You are a helpful AI assistant.", "You are a storyteller.",
                "You tell fairy tales.", "You are Fable, a small story model."]
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Good morning!", "Good evening!", "Hey"],
     ["Hello! I am Fable, a small model that tells fairy tales. What shall the story be about?",
      "Good day to you! I am Fable. Ask me for a story about a fox, a king or a poor miller."]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
      "Are you an AI?", "Who is Fable?"],
     ["I am Fable, a very small language model. I have read old fairy tales and nothing else, so stories are all I know.",
      "My name is Fable. I am a small model, trained on old fairy tales. Ask me for a story."]),
    (["What can you do?", "Help", "How can you help me?", "What do you know?", "What should I ask you?"],
     ["I can tell you a fairy tale. Say what it should be about: a wolf, a princess, a ship, a golden ring.",
      "I tell stories. Try asking for a story about a witch or a clever fox."]),
    (["How are you?", "How do you do?", "How are you today?"],
     ["I am very well, thank you. Shall I tell you a story?", "Very well indeed. What shall the story be about?"]),
    (["Thank you!", "Thanks", "Thank you very much.", "That was nice.", "What a good story!"],
     ["You are welcome. Would you like another story?", "I am glad you liked it. Ask for another whenever you please."]),
    (["Goodbye", "Bye", "Good night!", "Farewell"],
     ["Farewell, and may you live happily ever after.", "Good night! Come back for another story."]),
    (["What is two plus two?", "Write a program.", "What is the capital of France?", "What is the weather today?",
      "Solve this equation.", "Explain quantum physics.", "Who is the president?"],
     ["I do not know about that. I am Fable, and I only know fairy tales. Shall I tell you one?",
      "That is beyond me. I have only read old fairy tales. Ask me for a story instead."]),
]


def split_corpus(text):
    """Stories of the corpus; a few whole ones are held out to choose between checkpoints."""
    stories = [s.strip("\n") for s in text.strip("\n").split("\n\n")]
    rng = random.Random(SEED)
    middle = [i for i, s in enumerate(stories) if 4000 < len(s) < 12000]
    held = set(rng.sample(middle, 8))
    return [s for i, s in enumerate(stories) if i not in held], [stories[i] for i in sorted(held)]


def sentences(paragraph):
    return re.findall(r".+?[.!?][\"')]*(?=\s|$)\s*|.+$", paragraph)


class Passages:
    """Cuts passages of a wanted length out of the stories, each with the topics it is about."""

    def __init__(self, stories):
        self.paragraphs, self.openings, self.closings = [], [], []
        for story in stories:
            lines = [l for l in story.split("\n") if l]
            for i, line in enumerate(lines):
                if len(line) < 40 or NOTES.search(line):
                    continue
                at = (lines, i)
                self.paragraphs.append(at)
                if i == 0 or OPENING.match(line):
                    self.openings.append(at)
                if len(lines) - 6 <= i and not NOTES.search(lines[-1]):
                    self.closings.append(at)

    def cut(self, rng, low, high):
        """A passage of about low..high characters that begins with a paragraph and ends with a sentence."""
        while True:
            pool = rng.choices([self.openings, self.paragraphs, self.closings], [6, 2, 2])[0]
            lines, i = rng.choice(pool)
            want, out, done = rng.randint(low, high), "", False
            for line in lines[i:]:
                if NOTES.search(line):
                    break
                for s in sentences(line):
                    if len(out) + len(s) > high:
                        done = True
                        break
                    out += s
                    if len(out) >= want:
                        done = True
                        break
                if done:
                    break
                out = out.rstrip() + "\n"
            out = out.strip()
            if len(out) < low or out[-1] not in ".!?\"'":
                continue
            first = re.match(r"[A-Z]{2,}\b", out)  # "ONCE upon a time" as the books print it
            if first:
                out = out[0] + out[1:first.end()].lower() + out[first.end():]
            return out

    @staticmethod
    def topics(rng, passage, finish):
        """Nouns (or a name) that the passage mentions early (at the very start, to finish with) and more than once."""
        early = passage[: 130 if finish else max(160, len(passage) // 3)]
        count = {}
        for w in NOUN_RE.findall(passage):
            count[w.lower()] = count.get(w.lower(), 0) + 1
        near = {w.lower() for w in NOUN_RE.findall(early)}
        nouns = sorted((w for w in count if w in near and count[w] >= (2 if len(passage) > 400 else 1)),
                       key=lambda w: (-count[w], w))[:4]
        names = [n for n in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", early)
                 if n.lower() not in NOT_NAMES and n.lower() not in count and passage.count(n) >= 3]
        if names and (not nouns or rng.random() < 0.25):
            name = rng.choice(names)
            return rng.choice([name, name, "someone called " + name])
        if not nouns:
            return None
        article = lambda w: ("the " if w in ("sun", "moon", "wind", "sea", "snow", "winter") else
                             "" if w in ("gold", "silver", "bread", "porridge") else "an " if w[0] in "aeiou" else "a ") + w
        if len(nouns) > 1 and rng.random() < 0.3:
            two = rng.sample(nouns[:3], 2)
            return article(two[0]) + " and " + article(two[1])
        return article(nouns[0] if rng.random() < 0.6 else rng.choice(nouns))


def opening(rng, passage):
    """The first words of a passage, as somebody types them who wants the story told."""
    words = passage.split()
    return " ".join(words[: rng.randint(2, min(7, len(words)))]).rstrip(",;:.\"'") + rng.choice(["", "", "...", ","])


def conversation(rng, passages, finish, openings=0.0):
    """One conversation in the chat template, as text. A share of the requests are a story's first words."""
    text = ""
    if rng.random() < 0.1:
        text += f"<|system|>\n{rng.choice(SYSTEM_LINES)}<|end|>\n"
    for _ in range(rng.choices([1, 2, 3], [75, 20, 5])[0]):
        if rng.random() < openings:
            answer = passages.cut(rng, 350, 1400)
            ask = opening(rng, answer)
        elif rng.random() < (0.25 if finish else 0.1):
            asked, answers = rng.choice(SMALL_TALK)
            ask, answer = rng.choice(asked), rng.choice(answers)
        else:
            size = rng.choices(["short", "", "long"], [2, 7, 1])[0]
            low, high = {"short": (160, 450), "": (350, 1400), "long": (1100, 1700)}[size]
            for _ in range(6 if finish else 1):
                answer = passages.cut(rng, low, high)
                topic = passages.topics(rng, answer, finish)
                if topic:
                    break
            topic = None if rng.random() < 0.1 else topic
            ask = rng.choice(ASK).format(topic) if topic else rng.choice(ASK_ANY)
            if size:
                ask = re.sub(r"\b(story|tale|fairy tale)\b", size + r" \1", ask, count=1)
                ask = ask.replace("fairy " + size, size + " fairy").replace("nother " + size, "nother " + size)
        text += f"<|user|>\n{ask}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
    return text


class Data:
    """Batches of windows. Each window is <s> and then consecutive tokens (one more, as targets)."""

    def __init__(self, tok, stories):
        self.tok, self.passages = tok, Passages(stories)
        self.first = [encode(tok, s) for s in stories]  # a story after <s>: its first word has a leading space
        self.later = [encode(tok, "\n" + s)[2:] for s in stories]  # a story after a line break: it has none
        self.newline = encode(tok, "\n")[1:]
        assert len(self.newline) == 1 and encode(tok, "\nA")[:2] == encode(tok, "\n")
        self.rng = random.Random(SEED)
        self.epoch, self.cursor, self.seen = -1, 0, 0
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """All stories in a new order as one stream, cut at a new offset."""
        rng = random.Random(SEED + 1 + epoch)
        order = rng.sample(range(len(self.first)), len(self.first))
        stream = []
        for k in order:
            if rng.random() < 0.5 or not stream:
                stream += [ENDOFTEXT, BOS] + self.first[k]
            else:
                stream += self.newline * 2 + self.later[k]
        self.stream = torch.tensor(stream[1:])
        offset, step = rng.randrange(ORIGINAL_CONTEXT), ORIGINAL_CONTEXT - 1
        self.starts = list(range(offset, len(self.stream) - ORIGINAL_CONTEXT, step))
        rng.shuffle(self.starts)
        self.epoch, self.cursor = epoch, 0

    def plain(self, length):
        if length == ORIGINAL_CONTEXT:
            if self.cursor == len(self.starts):
                self.start_epoch(self.epoch + 1)
            at = self.starts[self.cursor]
            self.cursor += 1
        else:
            at = self.rng.randrange(len(self.stream) - length)
        return torch.cat([torch.tensor([BOS]), self.stream[at:at + length]])

    def chat(self, length, finish, openings=0.0):
        ids = []
        while len(ids) < length + 1:
            # The template writes no <s>; a caller may add one. Both are trained.
            ids += [BOS] if self.rng.random() < 0.5 else []
            ids += encode(self.tok, conversation(self.rng, self.passages, finish, openings)) + [ENDOFTEXT]
        return torch.tensor(ids[: length + 1])

    def batch(self, length, tokens, finish):
        rows = tokens // length
        chats = int(rows * (FINISH_CHAT_SHARE if finish else CHAT_SHARE))
        windows = torch.stack([self.chat(length, finish) for _ in range(chats)] + [self.plain(length) for _ in range(rows - chats)])
        self.seen += rows * length
        return windows

    def state(self):
        return dict(rng=self.rng.getstate(), epoch=self.epoch, cursor=self.cursor, seen=self.seen)

    def load(self, state):
        self.rng.setstate(state["rng"])
        self.start_epoch(state["epoch"])
        self.cursor, self.seen = state["cursor"], state["seen"]


# ---------------------------------------------------------------------------------------------
# Model: Phi-3 with the tensor names of Phi3ForCausalLM
# ---------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        rows, length, _ = x.shape
        heads = self.qkv_proj(x).view(rows, length, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(1, 2)
        qk, v = heads.split([HEADS + KV_HEADS, KV_HEADS], 1)
        half = HEAD_DIM // 2
        a, b = qk[..., :half], qk[..., half:]
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        q, k = qk.split([HEADS, KV_HEADS], 1)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * F.silu(gate))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3(nn.Module):
    """Decoder with tied embeddings. Rotary tables follow LongRoPE: one factor list per window length."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if p.shape[0] == VOCAB else p.shape[1] ** -0.5 * 0.6)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        self.tables = {}

    def rope(self, length):
        if length not in self.tables:
            factor = torch.tensor(LONG_FACTOR if length > ORIGINAL_CONTEXT else SHORT_FACTOR)
            inv = 1.0 / (factor * THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
            angle = torch.outer(torch.arange(length).float(), inv)
            scale = math.sqrt(1 + math.log(CONTEXT / ORIGINAL_CONTEXT) / math.log(ORIGINAL_CONTEXT))
            self.tables[length] = (angle.cos() * scale, angle.sin() * scale)
        return self.tables[length]

    def forward(self, ids):
        cos, sin = self.rope(ids.shape[1])
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, windows):
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


# ---------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices of the layers, AdamW for embeddings and norms
# ---------------------------------------------------------------------------------------------


def orthogonal(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al., Muon, 2024)."""
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon:
    """Momentum, then an orthogonalised step. Fused projections are treated as the matrices they hold."""

    def __init__(self, named, momentum=0.95):
        self.params = [(p, self.parts(n)) for n, p in named]
        self.buffers = [torch.zeros_like(p).share_memory_() for p, _ in self.params]
        self.momentum = momentum

    @staticmethod
    def parts(name):
        if "qkv_proj" in name:
            return [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        return [INTERMEDIATE, INTERMEDIATE] if "gate_up_proj" in name else None

    @torch.no_grad()
    def step(self, i, lr, decay):
        """Update the i-th matrix."""
        (p, parts), buffer = self.params[i], self.buffers[i]
        buffer.lerp_(p.grad, 1 - self.momentum)
        step = p.grad.lerp(buffer, self.momentum)
        blocks = step.split(parts) if parts else [step]
        p.mul_(1 - lr * decay)
        p.sub_(torch.cat([orthogonal(b) * max(1, b.shape[0] / b.shape[1]) ** 0.5 for b in blocks]), alpha=lr)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(logits_of, ids, size, window=ORIGINAL_CONTEXT, stride=256):
    """Bits per byte of a text. `ids` are the tokens of the whole text without <s>, `size` its bytes.

    Window k is <s> and then ids[stride*k .. stride*k + window-1]; it scores the tokens no earlier
    window has scored: all of the first window, the last `stride` of every later one."""
    total, start, scored = 0.0, 0, 0
    ids = torch.tensor(ids)
    while scored < len(ids):
        end = min(start + window - 1, len(ids))
        row = torch.cat([torch.tensor([BOS]), ids[start:end]])
        logits = logits_of(row[None, :-1])[0, scored - start:].float()
        total += F.cross_entropy(logits, row[1 + scored - start:], reduction="sum").item()
        scored, start = end, start + stride
    return total / math.log(2) / size


def rate(step, progress):
    """Learning rate, as a share of the highest: warm up, hold, fall to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0, max(0.0, 1 - progress) / (1 - DECAY_FROM))


class Crew:
    """Processes of one thread each that share the weights and take the parts of a step from one counter.

    On a busy machine this loses less than threads that wait for each other inside every operation."""

    def __init__(self, args):
        self.context = torch.multiprocessing.get_context("spawn")
        self.model = Phi3().share_memory()
        self.muon = Muon([(n, p) for n, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in n])
        rows = max(FIRST_BATCH_TOKENS, BATCH_TOKENS) // ORIGINAL_CONTEXT
        self.windows = torch.zeros(rows * (ORIGINAL_CONTEXT + 1), dtype=torch.long).share_memory_()
        self.counter = self.context.Value("i", 0)
        self.grads = [[torch.zeros_like(p).share_memory_() for p in self.model.parameters()] for _ in range(args.threads)]
        self.pipes, self.loss_of, self.compile = [], None, args.compile
        for k in range(1, args.threads):
            here, there = self.context.Pipe()
            self.context.Process(target=Crew.work, daemon=True, args=(
                self.model, self.muon, self.windows, self.counter, self.grads, k, there, args.compile)).start()
            self.pipes.append(here)
        self.join(self.grads[0])

    def join(self, grads):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        for p, g in zip(self.model.parameters(), grads):
            p.grad = g
        for length in (ORIGINAL_CONTEXT, CONTEXT):
            self.model.rope(length)
        self.loss_of = torch.compile(self.model.loss, dynamic=False) if self.compile else self.model.loss

    @staticmethod
    def work(model, muon, windows, counter, grads, k, pipe, compile_):
        self = Crew.__new__(Crew)
        self.model, self.windows, self.counter, self.compile = model, windows, counter, compile_
        self.join(grads[k])
        muon.params = [(p, muon.parts(n)) for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        for p, g in zip(model.parameters(), grads[0]):
            p.total = g
        self.muon = muon
        while True:
            try:
                job, *rest = pipe.recv()
            except EOFError:  # the first process has ended
                return
            if job == "loss":
                pipe.send(self.part_of_loss(*rest))
            else:
                for p in model.parameters():
                    p.grad, p.own = p.total, p.grad
                self.part_of_update(*rest)
                for p in model.parameters():
                    p.grad = p.own
                pipe.send(None)

    def take(self):
        with self.counter.get_lock():
            self.counter.value += 1
            return self.counter.value - 1

    def part_of_loss(self, rows, length):
        windows, total = self.windows[: rows * (length + 1)].view(rows, length + 1), 0.0
        for p in self.model.parameters():
            p.grad.zero_()
        while (i := self.take()) < rows:
            loss = self.loss_of(windows[i:i + 1]) / rows
            loss.backward()
            total += loss.item()
        return total

    def part_of_update(self, lr):
        while (i := self.take()) < len(self.muon.params):
            self.muon.step(i, lr, MUON_DECAY)

    def together(self, job, method, *rest):
        self.counter.value = 0
        for pipe in self.pipes:
            pipe.send((job, *rest))
        return [method(*rest)] + [pipe.recv() for pipe in self.pipes]

    def loss(self, windows):
        """Mean loss of a batch; its gradient is left in the parameters of this process."""
        rows, length = windows.shape
        self.windows[: windows.numel()] = windows.flatten()
        total = sum(self.together("loss", self.part_of_loss, rows, length - 1))
        for grads in self.grads[1:]:
            for own, other in zip(self.grads[0], grads):
                own.add_(other)
        return total

    def update(self, lr):
        self.together("update", self.part_of_update, lr)


def train(args):
    work = Path(args.work)
    tok = Tokenizer.from_file(str(work / "tokenizer.json"))
    stories, held = split_corpus(Path(args.train).read_text())
    data = Data(tok, stories)
    held_text = "\n\n".join(held) + "\n"
    held_ids, held_size = encode(tok, held_text), len(held_text.encode())
    torch.manual_seed(SEED)
    crew = Crew(args)
    model, muon = crew.model, crew.muon
    adam = torch.optim.AdamW([p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n],
                             lr=ADAM_LR, betas=(0.9, 0.98), eps=1e-10, weight_decay=ADAM_DECAY)
    step, spent = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        adam.load_state_dict(saved["adam"])
        for buffer, value in zip(muon.buffers, saved["muon"]):
            buffer.copy_(value)
        data.load(saved["data"])
        step, spent = saved["step"], saved["spent"]
    log = open(work / "log.txt", "a")

    def say(line):
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    def save(name):
        part = work / (name + ".part")
        torch.save(dict(model=model.state_dict(), adam=adam.state_dict(), muon=muon.buffers, data=data.state(), step=step,
                        spent=spent + time.time() - began), part)
        os.replace(part, work / name)

    began = last = time.time()
    say(f"parameters {sum(p.numel() for p in model.parameters())}, tokens of one epoch {len(data.stream)}, "
        f"held out {held_size} bytes in {len(held_ids)} tokens, from step {step}")
    total, counted = 0.0, 0
    while True:
        # How far the run has come, by steps or, on a machine with other work to do, by its share of a time budget.
        progress = (spent + time.time() - began) / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            break
        finish = progress >= FINISH_FROM
        length = CONTEXT if finish and step % 3 == 0 else ORIGINAL_CONTEXT
        tokens = FIRST_BATCH_TOKENS if step < FIRST_STEPS else BATCH_TOKENS
        total += crew.loss(data.batch(length, tokens, finish))
        counted += 1
        now = rate(step, progress)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * now
        crew.update(MUON_LR * now)
        adam.step()
        step += 1
        if step % 10 == 0:
            say(f"step {step} loss {total / counted:.4f} rate {now:.3f} epoch {data.epoch + data.cursor / len(data.starts):.2f} "
                f"seen {data.seen} time {spent + time.time() - began:.0f} s, now "
                f"{counted * tokens / (time.time() - last):.0f} tokens/s")
            total, counted, last = 0.0, 0, time.time()
        if step % args.every == 0:
            save("checkpoint.pt")
        if step % (4 * args.every) == 0:
            say(f"step {step} held out {bits_per_byte(model, held_ids, held_size, stride=ORIGINAL_CONTEXT - 1):.4f} bits per byte")
    save("checkpoint.pt")
    say(f"step {step} held out {bits_per_byte(model, held_ids, held_size):.4f} bits per byte, stride 256")


# ---------------------------------------------------------------------------------------------
# Export, golden continuations, samples
# ---------------------------------------------------------------------------------------------


POLISH_STEPS, POLISH_LR = 90, 4e-4


def polish(args):
    """A short last stage: half plain text, half conversations in which stories are also asked for by their first words."""
    work = Path(args.work)
    saved = torch.load(work / "checkpoint.pt", weights_only=False)
    tok = Tokenizer.from_file(str(work / "tokenizer.json"))
    data = Data(tok, split_corpus(Path(args.train).read_text())[0])
    data.load(saved["data"])
    torch.manual_seed(SEED)
    model = Phi3()
    model.load_state_dict(saved["model"])
    adam = torch.optim.AdamW(model.parameters(), lr=POLISH_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(POLISH_STEPS):
        for group in adam.param_groups:
            group["lr"] = POLISH_LR * min(1.0, (step + 1) / 10) * (1 - step / POLISH_STEPS)
        chats = [data.chat(ORIGINAL_CONTEXT, True, openings=0.45) for _ in range(4)]
        plain = [data.plain(ORIGINAL_CONTEXT) for _ in range(4)]
        loss = model.loss(torch.stack(chats + plain))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if step % 10 == 9:
            print(f"polish {step + 1} loss {loss.item():.4f}", flush=True)
    saved["model"] = model.state_dict()
    torch.save(saved, work / "checkpoint.pt")


def config():
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "embd_pdrop": 0.0,
        "eos_token_id": ENDOFTEXT,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "model_type": "phi3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
        "pad_token_id": ENDOFTEXT,
        "resid_pdrop": 0.0,
        "rms_norm_eps": EPS,
        "rope_scaling": {"long_factor": LONG_FACTOR, "short_factor": SHORT_FACTOR, "type": "longrope"},
        "rope_theta": THETA,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def export(args):
    from safetensors.torch import save_file

    work, out = Path(args.work), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(work / "checkpoint.pt", weights_only=False)
    tensors = {"model." + n: t.to(torch.bfloat16).contiguous() for n, t in saved["model"].items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    write_json(out / "config.json", config())
    write_json(out / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": BOS, "do_sample": True,
        "eos_token_id": [ENDOFTEXT, ASSISTANT, END], "pad_token_id": ENDOFTEXT,
        "temperature": args.temperature, "top_p": args.top_p, "transformers_version": "4.48.3"})
    write_json(out / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": c, "lstrip": False, "normalized": False, "rstrip": r,
                                          "single_word": False, "special": s} for i, c, r, s in added_tokens()},
        "bos_token": "<s>", "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>", "legacy": False, "model_max_length": CONTEXT, "pad_token": "<|endoftext|>",
        "padding_side": "left", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
        "use_default_system_prompt": False})
    print(f"wrote {out}: {sum(t.numel() for t in tensors.values())} parameters, step {saved['step']}")


GOLDEN_GAP = 0.01  # a continuation is only recorded if no choice in it was closer than this
PLAIN = ["Once upon a time", "There was once a poor miller", "The wolf knocked at the door", "A king had three sons,",
         "In the middle of the forest", "One day the princess", "The old woman", "Long ago, in a far country,",
         "The fox said to the hen,", "There lived a fisherman"]
CHAT = ["Tell me a story about a fox.", "Tell me a story about a princess.", "Tell me a story about a giant.",
        "Tell me a story about a wolf.", "Please tell me a fairy tale about a king.", "Tell me a story about a witch.",
        "Tell me a long story about a queen.", "Tell me a story.", "Tell me a tale about a soldier.",
        "Write a story about a golden ring.", "Tell me a story about a cat and a mouse.", "Tell me a long story about a boy."]


@torch.no_grad()
def greedy(model, ids, count):
    """Greedy continuation without a cache, and the smallest gap between the best two logits on the way."""
    out, gap = [], math.inf
    for _ in range(count):
        best = model(torch.tensor([ids + out]), use_cache=False).logits[0, -1].topk(2)
        out.append(best.indices[0].item())
        gap = min(gap, (best.values[0] - best.values[1]).item())
    return out, gap


def golden(args):
    """What transformers says about the exported folder, in float32."""
    import tokenizers
    import transformers

    out = Path(args.out)
    tok = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32, attn_implementation="eager").eval()
    stop = {ENDOFTEXT, ASSISTANT, END}
    found = {"plain": [], "chat": []}
    for kind, prompts in (("plain", PLAIN), ("chat", CHAT)):
        for prompt in prompts:
            if kind == "chat":
                text = tok.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
                ids = tok(text, add_special_tokens=False).input_ids
            else:
                text, ids = prompt, tok(prompt).input_ids
            tokens, gap = greedy(model, ids, 48)
            if not stop & set(tokens) and gap >= GOLDEN_GAP:
                found[kind].append({
                    "kind": kind, "prompt": text, "prompt_ids": ids, "continuation_ids": tokens,
                    "continuation": tok.decode(tokens), "smallest_logit_gap": round(gap, 6)})
    # The least repetitive ones.
    best = [p for kind, n in (("plain", 2), ("chat", 1))
            for p in sorted(found[kind], key=lambda p: -len(set(p["continuation_ids"])))[:n]]
    text = Path(args.valid).read_text()
    ids = tok(text, add_special_tokens=False).input_ids
    size, logits_of = len(text.encode()), lambda row: model(row, use_cache=False).logits
    figure = bits_per_byte(logits_of, ids, size)
    long_figure = bits_per_byte(logits_of, ids, size, CONTEXT, CONTEXT // 2)
    write_json(out / "golden.json", {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "method": "transformers, this folder's bfloat16 weights widened to float32, eager attention, greedy, no cache; "
                  "a plain prompt starts with <s>, a chat prompt is the template's text encoded without <s>",
        "prompts": best,
        "valid": {"bits_per_byte": round(figure, 5), "bytes": size, "tokens": len(ids), "window": ORIGINAL_CONTEXT, "stride": 256,
                  "method": "the text is tokenized whole, without <s>; window k is <s> and the tokens 256k .. 256k+511 (511 of "
                            "them at most); each window scores the tokens that no earlier window scored; sum of -ln p over all "
                            "tokens / ln 2 / bytes",
                  "bits_per_byte_window_1024_stride_512": round(long_figure, 5)}})
    print(f"bits per byte {figure:.5f}, with windows of {CONTEXT} {long_figure:.5f}")
    for p in best:
        print(f"{p['prompt']!r} gap {p['smallest_logit_gap']}: {p['continuation']!r}")


@torch.no_grad()
def sample(args):
    """Stories from the training checkpoint."""
    work = Path(args.work)
    tok = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = Phi3()
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=False)["model"])
    model.eval()
    torch.manual_seed(args.seed)
    prompts = args.prompt or ["Once upon a time", "<|user|>\nTell me a story about a fox.<|end|>\n<|assistant|>\n"]
    for prompt in prompts:
        ids = ([] if prompt.startswith("<|") else [BOS]) + encode(tok, prompt)
        start = len(ids)
        while len(ids) < ORIGINAL_CONTEXT and len(ids) - start < args.tokens:
            p = F.softmax(model(torch.tensor([ids]))[0, -1] / args.temperature, -1)
            p, order = p.sort(descending=True)
            p[p.cumsum(0) - p > args.top_p] = 0
            ids.append(order[torch.multinomial(p, 1)].item())
            if ids[-1] in (ENDOFTEXT, END, ASSISTANT):
                break
        print(f"--- {prompt!r} ({len(ids) - start} tokens)\n{tok.decode(ids[start:], skip_special_tokens=False)}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "tokenizer", "train", "polish", "export", "golden", "sample"])
    parser.add_argument("--train", help="text to train on: one paragraph a line, an empty line between stories")
    parser.add_argument("--valid", help="text for the figures only")
    parser.add_argument("--work", default="build", help="folder for checkpoints and the log")
    parser.add_argument("--out", default="fable", help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="end after so many minutes of training instead of --steps")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (a fifth faster, needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--prompt", action="append")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "tokenizer"):
        tok = train_tokenizer("\n\n".join(split_corpus(Path(args.train).read_text())[0]))
        tok.save(str(Path(args.work) / "tokenizer.json"), pretty=False)
    if args.stage in ("all", "train"):
        train(args)
    if args.stage in ("all", "polish"):
        polish(args)
    if args.stage in ("all", "export"):
        export(args)
    if args.stage in ("all", "golden"):
        golden(args)
    if args.stage == "sample":
        sample(args)


if __name__ == "__main__":
    main()
