//! What the bus has, as iproute2's `vdpa` shows it: the same words for people, the same JSON for programs.

use netlink::generic::{Attributes, number_of, text_of};
use serde_json::{Map, Value, json};

use super::attr;

/// `VIRTIO_NET_S_LINK_UP` and `_ANNOUNCE`.
const LINK_UP: u64 = 1;
const ANNOUNCE: u64 = 2;

fn class(id: u64) -> &'static str {
    match id {
        1 => "net",
        2 => "block",
        _ => "< unknown class >",
    }
}

fn kind(id: u64) -> &'static str {
    match id {
        1 => "network",
        2 => "block",
        _ => "<unknown type>",
    }
}

fn mgmtdev_name(m: &Attributes) -> String {
    let name = m.text(attr::MGMTDEV_DEV_NAME).unwrap_or_default();
    m.text(attr::MGMTDEV_BUS_NAME).map_or(name.clone(), |bus| format!("{bus}/{name}"))
}

/// A number for one that has no name.
fn feature(bit: u32, device: u64) -> Value {
    let transport = match bit {
        28 => "RING_INDIRECT_DESC",
        29 => "RING_EVENT_IDX",
        32 => "VERSION_1",
        33 => "ACCESS_PLATFORM",
        34 => "RING_PACKED",
        35 => "IN_ORDER",
        36 => "ORDER_PLATFORM",
        37 => "SR_IOV",
        38 => "NOTIFICATION_DATA",
        _ => "",
    };
    let net = match bit {
        0 => "CSUM",
        1 => "GUEST_CSUM",
        2 => "CTRL_GUEST_OFFLOADS",
        3 => "MTU",
        5 => "MAC",
        7 => "GUEST_TSO4",
        8 => "GUEST_TSO6",
        9 => "GUEST_ECN",
        10 => "GUEST_UFO",
        11 => "HOST_TSO4",
        12 => "HOST_TSO6",
        13 => "HOST_ECN",
        14 => "HOST_UFO",
        15 => "MRG_RXBUF",
        16 => "STATUS",
        17 => "CTRL_VQ",
        18 => "CTRL_RX",
        19 => "CTRL_VLAN",
        20 => "CTRL_RX_EXTRA",
        21 => "GUEST_ANNOUNCE",
        22 => "MQ",
        23 => "CTRL_MAC_ADDR",
        24 => "NOTIFY_ON_EMPTY",
        27 => "ANY_LAYOUT",
        57 => "HASH_REPORT",
        60 => "RSS",
        61 => "RSC_EXT",
        62 => "STANDBY",
        63 => "SPEED_DUPLEX",
        _ => "",
    };
    let known = if (28..=38).contains(&bit) {
        transport
    } else if device == 1 {
        net
    } else {
        ""
    };
    if known.is_empty() { bit.into() } else { known.into() }
}

fn features(bits: u64, device: u64) -> Value {
    (0..64).filter(|bit| bits & 1 << bit != 0).map(|bit| feature(bit, device)).collect()
}

/// Sections by the name of what they are about: the JSON that iproute2 prints.
fn section(name: &str, entries: impl Iterator<Item = (String, Map<String, Value>)>) -> Value {
    let entries: Map<String, Value> = entries.map(|(name, entry)| (name, entry.into())).collect();
    json!({ name: entries })
}

fn put(entry: &mut Map<String, Value>, name: &str, value: Option<u64>) {
    if let Some(value) = value {
        entry.insert(name.into(), value.into());
    }
}

/// `vdpa mgmtdev show`.
pub fn mgmtdevs(messages: &[Attributes]) -> Value {
    section(
        "mgmtdev",
        messages.iter().map(|m| {
            let mut entry = Map::new();
            let classes = m.number(attr::MGMTDEV_SUPPORTED_CLASSES).unwrap_or(0);
            let names: Value = (1..64).filter(|id| classes & 1 << id != 0).map(class).collect();
            entry.insert("supported_classes".into(), names);
            put(&mut entry, "max_supported_vqs", m.number(attr::DEV_MGMTDEV_MAX_VQS));
            if let Some(bits) = m.number(attr::DEV_SUPPORTED_FEATURES) {
                let net = u64::from(classes & 2 != 0);
                entry.insert("dev_features".into(), features(bits, net));
            }
            (mgmtdev_name(m), entry)
        }),
    )
}

/// `vdpa dev show`.
pub fn devices(messages: &[Attributes]) -> Value {
    section(
        "dev",
        messages.iter().map(|m| {
            let mut entry = Map::new();
            entry.insert("type".into(), kind(m.number(attr::DEV_ID).unwrap_or(0)).into());
            entry.insert("mgmtdev".into(), mgmtdev_name(m).into());
            put(&mut entry, "vendor_id", m.number(attr::DEV_VENDOR_ID));
            put(&mut entry, "max_vqs", m.number(attr::DEV_MAX_VQS));
            put(&mut entry, "max_vq_size", m.number(attr::DEV_MAX_VQ_SIZE));
            (m.text(attr::DEV_NAME).unwrap_or_default(), entry)
        }),
    )
}

/// `vdpa dev config show`.
pub fn config(messages: &[Attributes]) -> Value {
    section(
        "config",
        messages.iter().map(|m| {
            let mut entry = Map::new();
            let id = m.number(attr::DEV_ID).unwrap_or(0);
            if id == 1 {
                if let Some(mac) = m.all(attr::DEV_NET_CFG_MACADDR).next() {
                    let hex: Vec<_> = mac.iter().map(|b| format!("{b:02x}")).collect();
                    entry.insert("mac".into(), hex.join(":").into());
                }
                if let Some(status) = m.number(attr::DEV_NET_STATUS) {
                    // With the blanks that iproute2 has there.
                    let link = if status & LINK_UP != 0 { "up" } else { "down" };
                    entry.insert("link ".into(), link.into());
                    entry.insert("link_announce ".into(), (status & ANNOUNCE != 0).into());
                }
                put(&mut entry, "max_vq_pairs", m.number(attr::DEV_NET_CFG_MAX_VQP));
                put(&mut entry, "mtu", m.number(attr::DEV_NET_CFG_MTU));
                if let Some(bits) = m.number(attr::DEV_NEGOTIATED_FEATURES) {
                    entry.insert("negotiated_features".into(), features(bits, id));
                }
            }
            (m.text(attr::DEV_NAME).unwrap_or_default(), entry)
        }),
    )
}

/// `vdpa dev vstats show`.
pub fn statistics(messages: &[Attributes]) -> Value {
    section(
        "vstats",
        messages.iter().map(|m| {
            let names = m.all(attr::DEV_VENDOR_ATTR_NAME).map(|v| text_of(&v));
            let values = m.all(attr::DEV_VENDOR_ATTR_VALUE).map(|v| number_of(&v).unwrap_or(0));
            let entry = names.zip(values).map(|(name, value)| (name, value.into())).collect();
            (m.text(attr::DEV_NAME).unwrap_or_default(), entry)
        }),
    )
}

/// In which order words go into a line.
const ORDER: [&str; 14] = [
    "type",
    "mgmtdev",
    "vendor_id",
    "max_vqs",
    "max_vq_size",
    "supported_classes",
    "max_supported_vqs",
    "dev_features",
    "mac",
    "link ",
    "link_announce ",
    "max_vq_pairs",
    "mtu",
    "negotiated_features",
];

/// For people: a line for each.
pub fn plain(shown: &Value) -> String {
    let bit = |value: &Value| value.as_str().map_or_else(|| format!("bit_{value}"), str::to_owned);
    let word = |value: &Value| match value {
        Value::String(s) => s.clone(),
        Value::Array(all) => all.iter().map(bit).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    };
    let sections = shown.as_object().into_iter().flat_map(Map::values).filter_map(Value::as_object);
    let lines = sections.flatten().map(|(name, entry)| {
        let mut words: Vec<_> = entry.as_object().into_iter().flatten().collect();
        words.sort_by_key(|(key, _)| ORDER.iter().position(|known| known == key));
        let words: Vec<_> =
            words.iter().map(|(key, value)| format!("{} {}", key.trim_end(), word(value))).collect();
        format!("{name}: {}", words.join(" "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::DefaultNla;

    fn message(attributes: &[(u16, &[u8])]) -> Attributes {
        let attributes = attributes.iter().map(|&(kind, value)| DefaultNla::new(kind, value.to_vec()));
        Attributes::new(attributes.collect())
    }

    #[test]
    fn devices_are_shown_as_iproute2_shows_them() {
        let m = message(&[
            (attr::DEV_NAME, b"disk0\0"),
            (attr::MGMTDEV_DEV_NAME, b"vduse\0"),
            (attr::DEV_ID, &2u32.to_ne_bytes()),
            (attr::DEV_VENDOR_ID, &0u32.to_ne_bytes()),
            (attr::DEV_MAX_VQS, &4u32.to_ne_bytes()),
            (attr::DEV_MAX_VQ_SIZE, &256u16.to_ne_bytes()),
        ]);
        let shown = devices(&[m]);
        assert_eq!(
            shown,
            json!({"dev": {"disk0": {"type": "block", "mgmtdev": "vduse", "vendor_id": 0, "max_vqs": 4, "max_vq_size": 256}}})
        );
        assert_eq!(plain(&shown), "disk0: type block mgmtdev vduse vendor_id 0 max_vqs 4 max_vq_size 256");
    }

    #[test]
    fn what_is_counted_is_shown_by_name() {
        let m = message(&[
            (attr::DEV_NAME, b"card\0"),
            (attr::DEV_VENDOR_ATTR_NAME, b"received_desc\0"),
            (attr::DEV_VENDOR_ATTR_VALUE, &417_776u64.to_ne_bytes()),
            (attr::DEV_VENDOR_ATTR_NAME, b"completed_desc\0"),
            (attr::DEV_VENDOR_ATTR_VALUE, &417_548u64.to_ne_bytes()),
        ]);
        let shown = statistics(&[m]);
        assert_eq!(shown, json!({"vstats": {"card": {"received_desc": 417_776, "completed_desc": 417_548}}}));
        let plain = plain(&shown);
        let words: std::collections::BTreeSet<_> = plain.split(' ').collect();
        assert!(plain.starts_with("card: ") && words.len() == 5, "{plain}");
        assert!(plain.contains("received_desc 417776") && plain.contains("completed_desc 417548"), "{plain}");
    }

    #[test]
    fn whatever_comes_is_shown() {
        let odd = message(&[(attr::DEV_ID, b"x"), (attr::DEV_MAX_VQS, b"123"), (attr::DEV_NAME, &[0xff, 0])]);
        for show in [mgmtdevs, devices, config, statistics] {
            plain(&show(std::slice::from_ref(&odd)));
        }
        assert_eq!(feature(34, 2), "RING_PACKED");
        assert_eq!(feature(9, 2), 9);
        assert_eq!(
            plain(&json!({"x": {"n": {"f": features(1 << 9 | 1 << 34, 2)}}})),
            "n: f bit_9 RING_PACKED"
        );
        assert_eq!(feature(9, 1), "GUEST_ECN");
    }
}
