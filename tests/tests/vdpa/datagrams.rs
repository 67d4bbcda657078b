//! This program in the guest: datagrams that its kernel has in one piece, to be segmented by whoever needs that (UDP_SEGMENT),
//! and whoever takes them.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

/// Where the receiver listens.
pub const PORT: u16 = 7002;
/// Bytes of a datagram, datagrams of a piece, and pieces.
const SEGMENT: usize = 1200;
pub const SEGMENTS: usize = 40;
pub const PIECES: usize = 8;

fn content(piece: usize) -> Vec<u8> {
    let byte = |at: usize| (at / SEGMENT * 31 + at % SEGMENT * 7 + piece) as u8;
    (0..SEGMENT * SEGMENTS).map(byte).collect()
}

/// What the program is told in a guest: `receive`, or `send` and an address.
pub fn main(args: &[String]) -> Result<()> {
    match args {
        [mode] if mode == "receive" => receive(),
        [mode, to] if mode == "send" => send(to.parse()?),
        _ => bail!("receive, or send ADDRESS"),
    }
}

/// One piece after the other, each when the last one has come.
fn send(to: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &(SEGMENT as i32)).context("UDP_SEGMENT")?;
    let mut again = 0;
    for piece in 0..PIECES {
        loop {
            socket.send(&content(piece))?;
            let mut said = [0; 8];
            match socket.recv(&mut said) {
                Ok(8) if u64::from_le_bytes(said) == piece as u64 => break,
                // Said of the last one again.
                Ok(_) => {}
                Err(_) => again += 1,
            }
            ensure!(again < 20, "piece {piece} does not arrive");
        }
    }
    println!("{again}");
    Ok(())
}

/// Takes the pieces, datagram by datagram, and says of each when it is whole.
fn receive() -> Result<()> {
    let socket = UdpSocket::bind(("::", PORT))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut bytes = vec![0; 1 << 16];
    for piece in 0..PIECES {
        let want = content(piece);
        let mut missing: Vec<bool> = vec![true; SEGMENTS];
        while missing.contains(&true) {
            let (len, from) = socket.recv_from(&mut bytes)?;
            let place = want.chunks(SEGMENT).position(|segment| *segment == bytes[..len]);
            match place {
                Some(place) => missing[place] = false,
                // Of the last piece, which was sent again.
                None if content(piece.wrapping_sub(1)).chunks(SEGMENT).any(|s| *s == bytes[..len]) => {}
                None => bail!("piece {piece}: {len} bytes that nobody has sent"),
            }
            if !missing.contains(&true) {
                socket.send_to(&(piece as u64).to_le_bytes(), from)?;
            }
        }
    }
    Ok(())
}
