//! A kernel of the test's own: it answers byte for byte.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use netlink_packet_core::DefaultNla;
use proptest::prelude::*;

use crate::generic::{Attributes, Family, Generic, nested, number_of, text};
use crate::{Connection, HEADER, Socket, in_words};

/// `GENL_ID_CTRL`, and what the test's family is.
const CONTROL: u16 = 16;
const FAMILY: u16 = 0x1b;
const DONE: u16 = 3;
const ERROR: u16 = 2;

#[derive(Clone, Debug)]
struct Test;

impl Family for Test {
    const NAME: &'static str = "test";
}

/// What is asked is kept; each answer is a datagram.
#[derive(Default)]
struct Datagrams {
    asked: Vec<Vec<u8>>,
    answers: VecDeque<Vec<u8>>,
}

#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<Datagrams>>);

impl Socket for Kernel {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().asked.push(bytes.to_vec());
        Ok(())
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        self.0.lock().unwrap().answers.pop_front().ok_or(io::ErrorKind::TimedOut.into())
    }
}

fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let length = HEADER + payload.len();
    let mut bytes = (length as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(0u16.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(7u32.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// `struct nlmsgerr`, with a reason if there is one.
fn error(sequence: u32, errno: i32, reason: &str) -> Vec<u8> {
    let mut payload = (-errno).to_ne_bytes().to_vec();
    payload.extend(&message(FAMILY, sequence, &[])[..HEADER]);
    if !reason.is_empty() {
        payload.extend((4 + reason.len() as u16 + 1).to_ne_bytes());
        payload.extend(1u16.to_ne_bytes());
        payload.extend(reason.as_bytes());
        payload.push(0);
    }
    message(ERROR, sequence, &payload)
}

/// A number with a generic header before it.
fn answer(sequence: u32, kind: u16, value: u32) -> Vec<u8> {
    let mut payload = vec![5, 1, 0, 0, 8, 0];
    payload.extend(kind.to_ne_bytes());
    payload.extend(value.to_ne_bytes());
    message(FAMILY, sequence, &payload)
}

fn kernel() -> Kernel {
    let kernel = Kernel::default();
    let family = [vec![1, 2, 0, 0, 6, 0, 1, 0], FAMILY.to_ne_bytes().to_vec(), vec![0, 0]].concat();
    kernel.put([message(CONTROL, 1, &family), error(1, 0, "")].concat());
    kernel
}

impl Kernel {
    fn put(&self, datagram: Vec<u8>) {
        self.0.lock().unwrap().answers.push_back(datagram);
    }

    fn open(&self) -> Generic<Test> {
        Generic::over(Connection::over(Box::new(self.clone()))).unwrap().expect("the family")
    }
}

#[test]
fn questions_are_laid_out_as_the_kernel_wants_them() {
    let kernel = kernel();
    let mut generic = kernel.open();
    kernel.put(error(2, 0, ""));
    generic.call(9, vec![text(4, "x"), nested(5, &[DefaultNla::new(1, vec![7])])]).unwrap();
    let asked = kernel.0.lock().unwrap().asked.clone();
    // Request and acknowledgement wanted; sequence, port; command, version; attributes, padded.
    let mut wanted =
        message(FAMILY, 2, &[9, 1, 0, 0, 6, 0, 4, 0, b'x', 0, 0, 0, 12, 0, 5, 0x80, 5, 0, 1, 0, 7, 0, 0, 0]);
    wanted[6] = 5;
    wanted[12..16].fill(0);
    assert_eq!(asked[1], wanted);
    let name = asked[0].windows(5).any(|w| w == b"test\0");
    assert!(name, "{:?}", asked[0]);
}

#[test]
fn answers_of_one_question_are_collected_and_those_of_others_passed_over() {
    let kernel = kernel();
    let mut generic = kernel.open();
    kernel.put([answer(1, 3, 9), answer(2, 3, 10)].concat());
    kernel.put([answer(2, 3, 11), message(DONE, 2, &[0; 4]), answer(2, 3, 12)].concat());
    let all = generic.dump(9, vec![]).unwrap();
    assert_eq!(all.iter().map(|a| a.number(3)).collect::<Vec<_>>(), [Some(10), Some(11)]);
}

#[test]
fn refusals_are_in_words() {
    let kernel = kernel();
    let mut generic = kernel.open();
    kernel.put(error(2, 16, "it is in use"));
    let refused = generic.call(9, vec![]).unwrap_err();
    assert_eq!(refused.to_string(), "Device or resource busy: it is in use");
    kernel.put(error(3, 1, ""));
    assert_eq!(generic.call(9, vec![]).unwrap_err().to_string(), "Operation not permitted");
    kernel.put(message(DONE, 4, &(-95i32).to_ne_bytes()));
    assert!(generic.dump(9, vec![]).unwrap_err().to_string().contains("not supported"));
    // A kernel that says nothing, and a family that it has not.
    assert_eq!(generic.call(9, vec![]).unwrap_err().error.kind(), io::ErrorKind::TimedOut);
    let nobody = Kernel::default();
    nobody.put(error(1, 2, ""));
    assert!(Generic::<Test>::over(Connection::over(Box::new(nobody))).unwrap().is_none());
}

#[test]
fn lengths_are_held_against_what_came() {
    for length in [0u32, 15, 29, u32::MAX] {
        let kernel = kernel();
        let mut generic = kernel.open();
        let mut datagram = answer(2, 3, 1);
        datagram[..4].copy_from_slice(&length.to_ne_bytes());
        kernel.put(datagram);
        let refused = generic.call(9, vec![]).unwrap_err().to_string();
        assert!(refused.contains("longer than what came"), "{length}: {refused}");
    }
}

#[test]
fn errors_in_words_are_behind_the_header() {
    let mut payload = vec![0; HEADER];
    payload.extend([8, 0, 2, 0, 1, 2, 3, 4]);
    payload.extend([8, 0, 1, 0, b'n', b'o', b'!', 0]);
    assert_eq!(in_words(&payload).as_deref(), Some("no!"));
    assert_eq!(in_words(&payload[..HEADER]), None);
    assert_eq!(in_words(&payload[..4]), None);
}

#[test]
fn values_are_numbers_strings_or_attributes() {
    let inner = nested(5, &[DefaultNla::new(1, vec![7]), text(2, "a")]);
    let all = Attributes::new(vec![inner, text(4, "x"), DefaultNla::new(6, vec![1, 2, 3])]);
    assert_eq!((all.nested(5).number(1), all.nested(5).text(2)), (Some(7), Some("a".into())));
    assert_eq!((all.text(4), all.number(6), all.number(9)), (Some("x".into()), None, None));
    assert_eq!(all.nested(6), Attributes::default());
    assert_eq!(number_of(&[1, 0]), Some(1u16.to_ne_bytes()[0].into()));
}

proptest! {
    /// Whatever comes ends a question, well or not.
    #[test]
    fn whatever_comes_is_an_end(datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..4), at in 0..44usize, byte: u8) {
        let kernel = kernel();
        let mut generic = kernel.open();
        let mut close = [answer(2, 3, 1), error(2, 5, "words")].concat();
        if let Some(there) = close.get_mut(at) {
            *there = byte;
        }
        kernel.put(close);
        for datagram in datagrams {
            kernel.put(datagram);
        }
        let _ = generic.call(9, vec![]);
    }
}
