"""Whoever is missing is named, to all who came, within the time given."""

import socket
import threading
import time

import pytest

from educe import roll_call


def port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def call(indices, count=None, wait=10.0, names=(), late=0.0, counts=None):
  """What each of these processes heard: None, or its error."""
  address, found = f'localhost:{port()}', {}

  def one(place, index):
    if place == len(indices) - 1:
      time.sleep(late)
    of = (counts or {}).get(index, count or len(indices))
    try:
      found[place] = roll_call.roll_call(address, of, index, wait, names)
    except roll_call.Absent as error:
      found[place] = str(error)

  threads = [threading.Thread(target=one, args=x) for x in enumerate(indices)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return [found[place] for place in range(len(indices))], address


@pytest.mark.parametrize('late', [0.0, 0.5])
@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0)])
def test_all_who_come_go_on_and_the_port_is_free_again(order, late):
  found, address = call(order, late=late)
  assert found == [None] * 3
  with socket.create_server(('', int(address.rpartition(':')[2]))):
    pass


def test_one_process_waits_for_nobody():
  roll_call.roll_call('nowhere.invalid:1', 1, 0, 0.1)


def test_who_is_missing_is_named_to_all_who_came():
  start = time.monotonic()
  found, _ = call((0, 2), count=4, wait=1.0, names=['a', 'b', 'c', 'd'])
  assert time.monotonic() - start < 5
  for text in found:
    assert text == (
      'waited 1 s for process 1 (b), 3 (d) of 4: it never arrived; look at its log, or '
      'give it more time with --wait'
    )


def test_without_the_first_it_is_the_first_that_is_missing():
  (text,), address = call((1,), count=2, wait=0.5)
  assert text.startswith(
    f'waited 0.5 s for process 0 (localhost) of 2: it never arrived ({address}: '
  )


def test_an_address_that_nobody_has_is_told_as_such():
  with pytest.raises(
    roll_call.Absent, match=r'process 0 \(nobody.invalid\).*nobody.inv'
  ):
    roll_call.roll_call('nobody.invalid:1234', 2, 1, 0.5)


def test_two_of_one_number_and_two_counts_are_one_line():
  found, _ = call((0, 1, 1), count=3)
  assert found == ['two processes say that they are process 1 of 3'] * 3
  found, _ = call((0, 1), counts={0: 2, 1: 3})
  assert found == ['process 1 counts 3 processes, and process 0 2'] * 2


def test_a_stranger_is_not_counted():
  at = port()

  def stranger():
    for _ in range(100):
      try:
        with socket.create_connection(('localhost', at)) as to:
          to.sendall(b'GET / HTTP/1.1\r\n\r\n')
          return
      except OSError:
        time.sleep(0.02)

  thread = threading.Thread(target=stranger)
  thread.start()
  with pytest.raises(roll_call.Absent, match='for process 1 of 2'):
    roll_call.roll_call(f'localhost:{at}', 2, 0, 1.5)
  thread.join()


def test_one_that_was_restarted_may_come_again():
  at, found = port(), []

  def first():
    found.append(roll_call.roll_call(f'localhost:{at}', 3, 0, 10))

  thread = threading.Thread(target=first)
  thread.start()
  for _ in range(100):
    try:
      with socket.create_connection(('localhost', at)) as to:
        to.sendall(b'{"process": 1, "of": 3}')
        break
    except OSError:
      time.sleep(0.02)
  others = [
    threading.Thread(target=roll_call.roll_call, args=(f'localhost:{at}', 3, i, 10))
    for i in (1, 2)
  ]
  for each in others:
    each.start()
  for each in (thread, *others):
    each.join(20)
  assert found == [None]


def test_a_port_that_is_taken_is_one_line():
  with socket.create_server(('', 0)) as server:
    at = server.getsockname()[1]
    with pytest.raises(
      roll_call.Absent, match=f'--coordinator: port {at} cannot be ha'
    ):
      roll_call.roll_call(f'localhost:{at}', 2, 0, 1.0)
