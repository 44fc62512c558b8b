"""Chat templates: what a processor's template makes of a conversation, as text.

A chat template is a small program that comes with a checkpoint, and it is not always right. Before
vlmkit uses one, it tries it once, in a process of its own where the system allows that: a template
that loops for ever or asks for all memory ends there, and with an error.
"""

import contextlib
import ctypes
import os
import select
import signal
import threading

from vlmkit.errors import VlmkitError, brief

SECONDS = 3
"""The longest that a template may take."""

ROOM = 2**30
"""Bytes that a template may use, beside what the process has."""

MARK = "\ue000"
"""Stands for an answer, to see where a template puts it. No text has this character."""

_TRIED = {}


class TooSlow(Exception):
    """A template took longer than SECONDS."""


def template_of(processor):
    """The chat template of a processor, or else that of its tokenizer, as text; None if neither has
    one. Of several, it is the one called "default".

    Raises VlmkitError if it is not text.
    """
    for owner in (processor, getattr(processor, "tokenizer", None)):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, (list, tuple)):
            named = [one for one in found if isinstance(one, dict)]
            found = {one.get("name"): one.get("template") for one in named} or str(found)
        if isinstance(found, dict) and found:
            if "default" not in found:
                raise VlmkitError(
                    f"This {type(owner).__name__} has several chat templates, "
                    f"{', '.join(map(str, found))}, and none is called default: set "
                    "processor.chat_template to the right one."
                )
            found = found["default"]
        if found:
            if not isinstance(found, str):
                raise VlmkitError(
                    f"The chat template of this {type(owner).__name__} is no text but a "
                    f"{type(found).__name__}. Set processor.chat_template to a template."
                )
            return found
    return None


class Template:
    """The chat template of a processor, tried out.

    typed: whether it takes a message as a list of parts. Others take text, with the placeholder of
    a picture in it. opens: whether it writes something before the answer when it is asked to
    (add_generation_prompt).
    """

    def __init__(self, processor):
        self.processor, self.source = processor, template_of(processor)
        self.typed = self.opens = True
        if self.source is None or not hasattr(processor, "_resolve_chat_template"):
            return  # none, or something that only behaves like a processor of transformers
        placeholder = str(getattr(processor, "image_token", None) or "")
        key = self.source, placeholder
        if key not in _TRIED:
            _TRIED[key] = self._tried()
        self.typed, self.opens = _TRIED[key]

    def render(self, conversations, generation=False):
        """The text of each conversation, a list of turns (see `vlmkit.evaluation.prompts`)."""
        with _errors(), _time_limit():
            if not self.typed:
                conversations = [[self._flat(turn) for turn in turns] for turns in conversations]
            texts = self.processor.apply_chat_template(
                conversations,
                chat_template=self.source,
                add_generation_prompt=generation,
                tokenize=False,
            )
        return texts

    def _flat(self, turn):
        """A turn whose content is one text, with the placeholder where a picture is."""
        picture = str(getattr(self.processor, "image_token", None) or "<image>")
        text = ""
        for part in turn["content"]:
            if part["type"] == "image":
                text += picture + "\n"
            else:
                text += part["text"]
        return {**turn, "content": text}

    def _tried(self):
        """(typed, opens) of a template that has not been used yet."""
        picture, text = {"type": "image"}, {"type": "text", "text": f"{MARK}?"}
        with_picture = [{"role": "user", "content": [picture, text]}]
        with_text = [{"role": "user", "content": [text]}]
        with _errors():
            _try_apart(lambda: self.render([with_picture], True))
        problems = []
        for self.typed in (True, False):
            try:
                shown, bare = self.render([with_picture])[0], self.render([with_text])[0]
                asked = self.render([with_picture], True)[0]
            except VlmkitError as error:
                problems.append(error)
                continue
            if MARK not in shown or "'type'" in shown or '"type"' in shown:
                problems.append("it leaves out the question, or writes a list in its place")
            elif shown == bare:
                problems.append("it leaves out the picture")
            else:
                return self.typed, asked != shown
        if isinstance(problems[0], VlmkitError):
            raise problems[0]
        raise VlmkitError(
            f"The chat template cannot be used: {problems[0]}. Set processor.chat_template to one "
            "that belongs to this model."
        )


@contextlib.contextmanager
def _errors():
    """Whatever goes wrong in a template becomes a VlmkitError."""
    try:
        yield
    except VlmkitError:
        raise
    except TooSlow as error:
        raise VlmkitError(
            f"The chat template was not done after {SECONDS} seconds, so it was stopped. Set "
            "processor.chat_template to a correct one."
        ) from error
    except MemoryError as error:
        raise VlmkitError(
            f"The chat template asks for more than {ROOM:,} bytes of memory, so it was stopped. "
            "Set processor.chat_template to a correct one."
        ) from error
    except Exception as error:  # jinja's, or whatever Python the template runs
        raise VlmkitError(
            f"The chat template fails: {brief(error)}. Check the roles and contents of the "
            "messages, or set processor.chat_template to a correct one."
        ) from error


@contextlib.contextmanager
def _time_limit():
    """TooSlow is raised inside this context after SECONDS. It ends loops of Python, in any thread;
    it cannot end a single operation of the interpreter."""
    lock, thread, done = threading.Lock(), threading.get_ident(), []

    def stop():
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TooSlow)
                )

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done.append(True)
        timer.cancel()


def _try_apart(work):
    """Do `work` in a copy of this process that has a limit of time and memory. Raises TooSlow or
    MemoryError if it exceeds them. Errors of `work` itself are left for the real call.

    Without fork (Windows), nothing is tried."""
    if not hasattr(os, "fork"):
        return
    import resource

    receive, send = os.pipe()
    child = os.fork()
    if not child:  # nothing of the parent's may be cleaned up here: leave by _exit
        try:
            with contextlib.suppress(OSError, ValueError):
                used = _address_space()
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
            work()
            verdict = b"."
        except VlmkitError as error:
            verdict = {MemoryError: b"m", TooSlow: b"t"}.get(type(error.__cause__), b".")
        except BaseException:
            verdict = b"."
        os.write(send, verdict)
        os._exit(0)
    os.close(send)
    try:
        ready, _, _ = select.select([receive], [], [], 1.5 * SECONDS)
        verdict = os.read(receive, 1) if ready else b"t"
    finally:
        os.close(receive)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if verdict == b"t":
        raise TooSlow
    if verdict in (b"m", b""):  # without a word, the system has ended it
        raise MemoryError


def _address_space():
    """Bytes of address space of this process. Raises OSError where /proc does not say."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
