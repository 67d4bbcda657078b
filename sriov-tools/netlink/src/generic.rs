//! Generic netlink for families of which messages are commands with attributes, and nothing else.

use std::marker::PhantomData;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, Nla, NlasIterator, ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::errno::Errno;

use crate::{Connection, Refused};

/// A family, by the name that the kernel has for it.
pub trait Family: Clone + std::fmt::Debug {
    /// That.
    const NAME: &'static str;
}

/// Attributes, in the order in which they came: the same kind may be there more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<DefaultNla>);

impl Attributes {
    /// These.
    pub fn new(all: Vec<DefaultNla>) -> Attributes {
        Attributes(all)
    }

    /// Those in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Attributes, DecodeError> {
        let attributes = NlasIterator::new(bytes).map(|nla| {
            let nla = nla?;
            Ok(DefaultNla::new(nla.kind(), nla.value().to_vec()))
        });
        Ok(Attributes(attributes.collect::<Result<_, DecodeError>>()?))
    }

    /// The values of a kind.
    pub fn all(&self, kind: u16) -> impl Iterator<Item = Vec<u8>> {
        self.0.iter().filter(move |nla| nla.kind() & !NLA_F_NESTED == kind).map(|nla| {
            let mut bytes = vec![0; nla.value_len()];
            nla.emit_value(&mut bytes);
            bytes
        })
    }

    /// The first of a kind.
    pub fn value(&self, kind: u16) -> Option<Vec<u8>> {
        self.all(kind).next()
    }

    /// As a number of up to 64 bits.
    pub fn number(&self, kind: u16) -> Option<u64> {
        number_of(&self.value(kind)?)
    }

    /// As a string.
    pub fn text(&self, kind: u16) -> Option<String> {
        Some(text_of(&self.value(kind)?))
    }

    /// As attributes of its own; none if it is not there, or is something else.
    #[must_use]
    pub fn nested(&self, kind: u16) -> Attributes {
        self.value(kind).and_then(|bytes| Attributes::parse(&bytes).ok()).unwrap_or_default()
    }
}

/// A value as a number of up to 64 bits.
pub fn number_of(value: &[u8]) -> Option<u64> {
    Some(match value.len() {
        1 => value[0].into(),
        2 => u16::from_ne_bytes(value.try_into().ok()?).into(),
        4 => u32::from_ne_bytes(value.try_into().ok()?).into(),
        8 => u64::from_ne_bytes(value.try_into().ok()?),
        _ => return None,
    })
}

/// A value as a string, which has a NUL at its end.
pub fn text_of(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

/// An attribute with a string.
pub fn text(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), b"\0"].concat())
}

/// An attribute with attributes in it.
pub fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

/// A message of the family.
#[derive(Clone, Debug)]
struct Message<F> {
    command: u8,
    attributes: Attributes,
    family: PhantomData<F>,
}

impl<F: Family> GenlFamily for Message<F> {
    fn family_name() -> &'static str {
        F::NAME
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl<F> Emitable for Message<F> {
    fn buffer_len(&self) -> usize {
        self.attributes.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.0.as_slice().emit(buffer);
    }
}

impl<F> ParseableParametrized<[u8], GenlHeader> for Message<F> {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Message<F>, DecodeError> {
        Ok(Message { command: header.cmd, attributes: Attributes::parse(bytes)?, family: PhantomData })
    }
}

/// A conversation with a family.
#[derive(Debug)]
pub struct Generic<F> {
    connection: Connection,
    number: u16,
    family: PhantomData<F>,
}

impl<F: Family> Generic<F> {
    /// Begins one; none if this kernel has no such family, and no module that has.
    pub fn open() -> Result<Option<Generic<F>>, Refused> {
        Generic::over(Connection::open(NETLINK_GENERIC)?)
    }

    /// Begins one over this connection.
    pub fn over(mut connection: Connection) -> Result<Option<Generic<F>>, Refused> {
        let nlas = vec![GenlCtrlAttrs::FamilyName(F::NAME.into())];
        let question = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
        let answers = match connection.call(question) {
            Err(e) if e.error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
            answers => answers?,
        };
        let mut nlas = answers.into_iter().flat_map(|answer| answer.payload.nlas);
        let number = nlas.find_map(|nla| if let GenlCtrlAttrs::FamilyId(id) = nla { Some(id) } else { None });
        Ok(number.map(|number| Generic { connection, number, family: PhantomData }))
    }

    /// One question, or one thing to do.
    pub fn call(&mut self, command: u8, attributes: Vec<DefaultNla>) -> Result<Vec<Attributes>, Refused> {
        let message = self.message(command, attributes);
        Ok(self.connection.call(message)?.into_iter().map(|answer| answer.payload.attributes).collect())
    }

    /// All that there is of something.
    pub fn dump(&mut self, command: u8, attributes: Vec<DefaultNla>) -> Result<Vec<Attributes>, Refused> {
        let message = self.message(command, attributes);
        Ok(self.connection.dump(message)?.into_iter().map(|answer| answer.payload.attributes).collect())
    }

    fn message(&self, command: u8, attributes: Vec<DefaultNla>) -> GenlMessage<Message<F>> {
        let attributes = Attributes(attributes);
        let mut message = GenlMessage::from_payload(Message { command, attributes, family: PhantomData });
        message.set_resolved_family_id(self.number);
        message
    }
}
