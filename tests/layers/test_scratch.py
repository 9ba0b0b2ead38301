import threading

import torch

from vqdm.layers.scratch import _idle, free_scratch, scratch

CPU = torch.device("cpu")


def test_one_buffer_serves_all_and_grows_to_the_largest():
    free_scratch()
    pointers = []
    for shape in ((4, 8), (2, 3), (16, 8), (4, 8)):
        with scratch(shape, torch.float32, CPU) as out:
            assert out.shape == shape
            pointers.append(out.data_ptr())
    assert pointers[0] == pointers[1] and pointers[2] == pointers[3]
    assert [buffer.memory.numel() for buffer in _idle.values()] == [128]


def test_types_have_buffers_of_their_own():
    free_scratch()
    with scratch((4, 4), torch.float32, CPU) as a, scratch((4, 4), torch.float16, CPU) as b:
        assert a.dtype == torch.float32 and b.dtype == torch.float16
    assert len(_idle) == 2


def test_a_nested_call_does_not_overwrite():
    with scratch((4, 4), torch.float32, CPU) as outer:
        outer.fill_(1)
        with scratch((8, 8), torch.float32, CPU) as inner:
            inner.fill_(2)
        with scratch((4, 4), torch.float32, CPU) as again:
            again.fill_(3)
        assert (outer == 1).all()


def test_threads_do_not_share_what_is_lent():
    wrong = []

    def work(value):
        for _ in range(200):
            with scratch((32, 32), torch.float32, CPU) as out:
                out.fill_(value)
                if not (out == value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_comes_back_after_an_error_and_works_in_and_out_of_inference_mode():
    free_scratch()
    try:
        with torch.inference_mode(), scratch((4, 4), torch.float32, CPU):
            raise KeyError
    except KeyError:
        pass
    assert len(_idle) == 1
    with torch.no_grad(), scratch((4, 4), torch.float32, CPU) as out:
        out.fill_(1)
