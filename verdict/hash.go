package verdict

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"net/netip"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Hash is a content hash of the whole value: 64 hexadecimal digits. It is no promise to later versions.
func (v *Verdicts) Hash() string {
	d := newDigest()
	d.text(idText(v.Subject))
	d.number(int(v.Mode))
	d.table(&v.Ingress)
	d.table(&v.Egress)
	return d.sum()
}

// Hash is a content hash of one direction, whoever's it is: 64 hexadecimal digits.
func (t *Table) Hash() string {
	d := newDigest()
	d.table(t)
	return d.sum()
}

// Hash is a content hash of the peers of a block: 64 hexadecimal digits.
func (p *Peers) Hash() string {
	d := newDigest()
	d.peers(p)
	return d.sum()
}

// digest writes values down so that no two different ones are written alike: in order of their fields, each list and each text after its
// length.
type digest struct {
	hash hash.Hash
	buf  []byte
}

// digests are those that nobody uses just now: a large cluster has hundreds of thousands of values to hash.
var digests = sync.Pool{New: func() any { return &digest{hash: sha256.New(), buf: make([]byte, 0, 2048)} }}

func newDigest() *digest { return digests.Get().(*digest) }

// sum ends the digest.
func (d *digest) sum() string {
	d.flush()
	d.buf = d.hash.Sum(d.buf)
	s := hex.EncodeToString(d.buf)
	d.buf = d.buf[:0]
	d.hash.Reset()
	digests.Put(d)
	return s
}

func (d *digest) flush() {
	d.hash.Write(d.buf) // never fails (hash.Hash)
	d.buf = d.buf[:0]
}

func (d *digest) number(n int) {
	if len(d.buf) > 1024 {
		d.flush()
	}
	d.buf = binary.AppendVarint(d.buf, int64(n))
}

func (d *digest) text(s string) {
	d.number(len(s))
	d.buf = append(d.buf, s...)
}

func (d *digest) yes(is bool) {
	n := 0
	if is {
		n = 1
	}
	d.number(n)
}

func (d *digest) verdict(v Verdict) {
	d.yes(v.Allow)
	d.number(v.Reason)
}

func (d *digest) table(t *Table) {
	d.number(len(t.Isolating))
	for _, s := range t.Isolating {
		d.text(s)
	}
	d.number(len(t.Rules))
	for i := range t.Rules {
		r := &t.Rules[i]
		d.text(r.Policy)
		d.text(r.Rule)
		d.text(r.Peers)
		d.text(r.Ports)
	}
	d.number(len(t.Reasons))
	for i := range t.Reasons {
		r := &t.Reasons[i]
		d.text(r.Policy)
		d.text(r.Rule)
		d.text(r.Text)
		d.yes(r.Nearest)
		d.text(r.Direction)
	}
	d.number(len(t.Blocks))
	for i := range t.Blocks {
		b := &t.Blocks[i]
		d.number(int(b.Protocol))
		d.number(len(b.Ports))
		for _, r := range b.Ports {
			d.number(int(r.First))
			d.number(int(r.Last))
		}
		d.peers(&b.Peers)
	}
}

func (d *digest) peers(p *Peers) {
	d.number(len(p.ByIdentity))
	for i := range p.ByIdentity {
		id := &p.ByIdentity[i]
		d.text(idText(id.ID))
		d.verdict(id.Verdict)
		d.prefixes(id.Addresses)
	}
	d.prefixes(p.Identified)
	d.prefixes(p.Anonymous)
}

func (d *digest) prefixes(list []Prefix) {
	d.number(len(list))
	for i := range list {
		d.prefix(list[i].Prefix)
		d.verdict(list[i].Verdict)
	}
}

// prefix writes the length in bits and the family before the address, which has one of two lengths then.
func (d *digest) prefix(p netip.Prefix) {
	d.number(p.Bits())
	d.number(p.Addr().BitLen())
	b := p.Addr().As16()
	d.buf = append(d.buf, b[:]...)
}

// idText is an identity in full; empty: none.
func idText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}
