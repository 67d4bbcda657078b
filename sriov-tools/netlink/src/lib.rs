//! Questions to the kernel over netlink, and its answers, one after the other. What messages are made of is the
//! `netlink-packet-*` crates' business; [`generic`] has the families that these do not know.

pub mod generic;
mod refused;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::SocketAddr;

pub use refused::Refused;

/// Where datagrams go and come from: the kernel, or a test.
pub trait Socket: Send {
    /// Sends one.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Waits for the next one, whole.
    fn receive(&mut self) -> io::Result<Vec<u8>>;
}

impl Socket for netlink_sys::Socket {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        netlink_sys::Socket::send(self, bytes, 0).map(drop)
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.recv_from_full() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                received => return Ok(received?.0),
            }
        }
    }
}

/// A conversation.
pub struct Connection {
    socket: Box<dyn Socket>,
    sequence: u32,
}

impl Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Length of `struct nlmsghdr`, which an error gives back of the question.
const HEADER: usize = 16;

/// `NLMSGERR_ATTR_MSG`: an error in words.
const NLMSGERR_ATTR_MSG: u16 = 1;

impl Connection {
    /// Opens a socket of a netlink family.
    pub fn open(protocol: isize) -> io::Result<Connection> {
        let mut socket = netlink_sys::Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors in words, with no more of the question than its header before them.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Connection::over(Box::new(socket)))
    }

    /// Over this socket.
    pub fn over(socket: Box<dyn Socket>) -> Connection {
        Connection { socket, sequence: 0 }
    }

    /// All that there is of something.
    pub fn dump<I>(&mut self, message: I) -> Result<Vec<I>, Refused>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.ask(message, NLM_F_DUMP)
    }

    /// One question, or one thing to do.
    pub fn call<I>(&mut self, message: I) -> Result<Vec<I>, Refused>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.ask(message, NLM_F_ACK)
    }

    fn ask<I>(&mut self, message: I, flags: u16) -> Result<Vec<I>, Refused>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (NLM_F_REQUEST | flags, self.sequence);
        let mut question = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        question.finalize();
        let mut bytes = vec![0; question.buffer_len()];
        question.serialize(&mut bytes);
        self.socket.send(&bytes)?;
        let mut answers = Vec::new();
        loop {
            let bytes = self.socket.receive()?;
            let mut rest = &bytes[..];
            while rest.len() >= HEADER {
                let length = u32::from_ne_bytes(rest[..4].try_into().expect("four bytes")) as usize;
                if length < HEADER || length > rest.len() {
                    return Err(io::Error::other("netlink: a message is longer than what came").into());
                }
                let (one, next) = rest.split_at(length);
                rest = &next[(length.next_multiple_of(4) - length).min(next.len())..];
                // What the crate cannot read is a device of another kind: it says more than we ask for.
                let Ok(answer) = NetlinkMessage::<I>::deserialize(one) else { continue };
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(answers),
                    NetlinkPayload::Done(done) => return Err(Refused::errno(done.code.saturating_abs())),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(e) => {
                        return Err(Refused { error: e.to_io(), said: in_words(&e.header) });
                    }
                    _ => {}
                }
            }
        }
    }
}

/// What the kernel says of an error in words, behind the header of the question.
fn in_words(payload: &[u8]) -> Option<String> {
    let attributes = NlasIterator::new(payload.get(HEADER..)?);
    let said = attributes.flatten().find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    Some(String::from_utf8_lossy(said.value()).trim_end_matches('\0').to_owned())
}
