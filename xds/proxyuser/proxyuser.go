// Package proxyuser says as whom a pod's Envoy runs, and so whose connections the redirect lets pass: a user and a group that are drawn anew for
// each pod, so that nobody can know them when an image is made.
//
//	seed, 16 bytes ──► Range.User ──► runAsUser and runAsGroup (node mode), or what the agent makes Envoy (sidecar mode)
//
// Both have to be right for a connection to pass, so an image that says USER, or has a file of a user and group with the setuid and setgid bits, is right
// by chance in one of 2^54 pods. With many files it goes better: whoever executes a setuid file and then a setgid one has both. A million of each in
// an image come to one pod in 18,000; allowPrivilegeEscalation: false in the pod's spec has neither bit count.
//
// Only who comes before the pod does not know. In the pod /proc/net/tcp tells, and in node mode the pod's spec. Root with CAP_SETUID can be that user then.
// So can an image that is made after the pod and comes into it all the same: by a tag that is pulled again, as another image of a running pod, in a debugging
// container; runAsUser in the spec of a container keeps any image from it.
package proxyuser

import (
	"encoding/binary"
	"fmt"
)

// User is a user and a group of the user namespace that owns the pod's network namespace.
type User struct{ UID, GID uint32 }

// String is for messages.
func (u User) String() string { return fmt.Sprintf("user %d, group %d", u.UID, u.GID) }

// Seed is what a pod's user is made of: random bytes, unless the very same has to come out again.
type Seed [16]byte

// Range are numbers of users and of groups.
type Range struct{ First, Count uint32 }

var (
	// Pod is the range. Kubernetes takes users up to 2147483647. Below 2000000000 are those that OpenShift gives to namespaces, from 2147352576 on
	// systemd's for files of other machines, and no distribution or user database that is known begins in between.
	Pod = Range{First: 2_000_000_000, Count: 1 << 27}
	// Mapped is the range where Pod's numbers are none: a pod with hostUsers: false has the users 0 to 65535 (Kubernetes: user namespaces). It holds none
	// of the numbers that images commonly use, which are below, or just below 65536. It is small enough to be covered by setuid files.
	Mapped = Range{First: 20_000, Count: 40_000}
)

// User makes a user and a group of a seed, any with the same chance.
func (r Range) User(s Seed) User {
	pick := func(b []byte) uint32 { return r.First + uint32(binary.BigEndian.Uint64(b)%uint64(r.Count)) }
	return User{UID: pick(s[:8]), GID: pick(s[8:])}
}

// Has reports whether both numbers of a user are in the range.
func (r Range) Has(u User) bool { return r.HasID(int64(u.UID)) && r.HasID(int64(u.GID)) }

// HasID reports whether a number of a user or a group is in the range.
func (r Range) HasID(id int64) bool { return int64(r.First) <= id && id <= r.last() }

func (r Range) last() int64 { return int64(r.First) + int64(r.Count) - 1 }

// String is for messages.
func (r Range) String() string { return fmt.Sprintf("%d–%d", r.First, r.last()) }
