//! What hands a VF over to a virtual machine or one of our daemons.

use std::fmt::Write;

use clap::ValueEnum;

use crate::plan::VFIO;
use crate::state::{Pf, Vf};

/// Whom for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `<hostdev>` of a domain.
    Libvirt,
    /// Options of QEMU's command line.
    Qemu,
    /// Options of Cloud Hypervisor's command line.
    CloudHypervisor,
    /// An uplink of a switch: the VF's network interface.
    VhostNet,
    /// A disk: the NVMe VF's namespace.
    VhostBlk,
}

/// A VF that is not ready for that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// Virtual machines take it from VFIO.
    #[error("{0} is bound to {1}, and virtual machines take it from vfio-pci: sriov bind {0} vfio-pci")]
    NotVfio(String, String),
    /// The switch takes it from its network driver.
    #[error("{0} has no network interface here (bound to {1}): sriov bind {0} default")]
    NoInterface(String, String),
    /// Not a disk.
    #[error("{0} is no NVMe function with a driver (bound to {1}): sriov bind {0} nvme")]
    NoDisk(String, String),
}

/// The text that hands it over.
pub fn export(pf: &Pf, vf: &Vf, format: Format) -> Result<String, NotReady> {
    let function = &vf.function;
    let address = function.address;
    let bound = function.driver.clone().unwrap_or_else(|| "nothing".into());
    let vfio = matches!(format, Format::Libvirt | Format::Qemu | Format::CloudHypervisor);
    if vfio && function.driver.as_deref() != Some(VFIO) {
        return Err(NotReady::NotVfio(address.to_string(), bound));
    }
    let origin = format!("VF {} of {}", vf.index, pf.address());
    let mut text = String::new();
    match format {
        Format::Libvirt => {
            // Not `managed`, which would bind it to and fro; not `<interface>`, which would set its address and VLAN anew.
            let _ = write!(
                text,
                "<!-- {origin} -->\n\
                 <hostdev mode='subsystem' type='pci' managed='no'>\n  \
                   <driver name='vfio'/>\n  \
                   <source>\n    \
                     <address domain='0x{:04x}' bus='0x{:02x}' slot='0x{:02x}' function='0x{:x}'/>\n  \
                   </source>\n\
                 </hostdev>",
                address.domain, address.bus, address.device, address.function
            );
        }
        Format::Qemu => {
            let _ = write!(text, "-device vfio-pci,host={address}");
        }
        Format::CloudHypervisor => {
            let _ = write!(text, "--device path=/sys/bus/pci/devices/{address}/");
        }
        Format::VhostNet => {
            let interface = function.interfaces.first();
            let interface = interface.ok_or_else(|| NotReady::NoInterface(address.to_string(), bound))?;
            let _ = write!(
                text,
                "# {origin}, {address}: an uplink of the switch (vhost-net --config); af-packet instead of af-xdp goes through\n\
                 # the kernel's stack, and works with any driver\n\
                 switch = true\n\n[uplink]\naf-xdp = \"{}\"\nqueue = 0",
                interface.name
            );
        }
        Format::VhostBlk => {
            if crate::pci::class_name(function.class) != "nvme" || function.driver.as_deref() != Some("nvme")
            {
                return Err(NotReady::NoDisk(address.to_string(), bound));
            }
            let _ = write!(
                text,
                "# {origin}\nvhost-blk --socket-path /run/vhost-blk/{address}.sock --blk-file /dev/disk/by-path/pci-{address}-nvme-1"
            );
        }
    }
    Ok(text)
}
