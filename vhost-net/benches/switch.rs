//! What a decision of the switch costs: `cargo bench -p vhost-net --bench switch`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use vhost_net::mac::MacAddr;
use vhost_net::switch::fdb::FdbConfig;
use vhost_net::switch::vlan::Vlan;
use vhost_net::switch::{Frame, PortConfig, PortId, Switch, Verdict};

const PORTS: u16 = 16;

/// A UDP frame's first bytes.
fn frame(dst: u64, src: u64) -> [u8; 128] {
    let mut frame = [0; 128];
    frame[..6].copy_from_slice(&MacAddr::from_u64(dst).0);
    frame[6..12].copy_from_slice(&MacAddr::from_u64(src).0);
    frame[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0x00]);
    frame[26..30].copy_from_slice(&[10, 0, 0, 1]);
    frame
}

/// Frames of stations that know each other, one behind each port, in turns.
fn known(c: &mut Criterion, name: &str, change: impl Fn(&mut PortConfig, u64)) {
    let station = |port: u64| 0x5254_0000_0000 + port;
    let mut configs: Vec<_> = (0..PORTS).map(|i| PortConfig::new(format!("port{i}"))).collect();
    configs.iter_mut().zip(0..).for_each(|(config, i)| change(config, station(i)));
    let switch = Arc::new(Switch::new(FdbConfig::default(), &configs, 1));
    let mut shard = switch.shard(0);
    let frames: Vec<_> =
        (0..u64::from(PORTS)).map(|i| frame(station((i + 1) % u64::from(PORTS)), station(i))).collect();
    let mut pass = |now: u64| {
        for (port, bytes) in frames.iter().enumerate() {
            let verdict = shard.decide(PortId(port as u16), black_box(&Frame::whole(bytes, 64)), now);
            black_box(verdict);
        }
    };
    (0..PORTS).for_each(|port| switch.set_link(PortId(port), true));
    pass(0);
    // The figure is of as many frames as there are ports.
    c.bench_function(&format!("{PORTS} known unicast, {name}"), |b| b.iter(|| pass(1)));
    let first = Frame::whole(&frames[0], 64);
    assert!(matches!(switch.shard(0).decide(PortId(0), &first, 1), Verdict::One(PortId(1), _)));
}

fn decisions(c: &mut Criterion) {
    known(c, "no rules", |_, _| {});
    known(c, "access ports", |config, _| config.vlan = Vlan::Access(7));
    known(c, "guarded", |config, mac| {
        config.guard.macs = vec![MacAddr::from_u64(mac)];
        config.guard.ips = vec!["10.0.0.1/32".parse().unwrap()];
    });
    known(c, "rate limits", |config, _| {
        config.ingress.packets = Some(u64::MAX);
        config.ingress.bits = Some(u64::MAX);
    });
    let configs = [PortConfig::new("a"), PortConfig::new("b")];
    let switch = Arc::new(Switch::new(FdbConfig::default(), &configs, 1));
    let mut shard = switch.shard(0);
    (0..2).for_each(|port| switch.set_link(PortId(port), true));
    let mut source = 0;
    c.bench_function("an address beyond the port's share", |b| {
        b.iter_batched(
            || {
                source += 1;
                frame(0xffff_ffff_ffff, 0x0200_0000_0000 + source)
            },
            |bytes| shard.decide(PortId(0), &Frame::whole(&bytes, 64), 1),
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, decisions);
criterion_main!(benches);
