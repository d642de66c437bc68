package hold

import (
	"net"
	"testing"
	"time"

	"github.com/google/nftables"
)

// BenchmarkConnectKnown measures connections to an allowed destination with the table and, in turn, with its chain unhooked: the ratio is
// of one run.
func BenchmarkConnectKnown(b *testing.B) {
	connect(b)
	const address = "10.99.0.1:81"
	once := func() time.Duration {
		at := time.Now()
		c, err := net.Dial("tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		took := time.Since(at)
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
		return took
	}
	dormant := func(flags uint32) {
		conn, err := nftables.New()
		if err != nil {
			b.Fatal(err)
		}
		t := table()
		t.Flags = flags
		conn.AddTable(t)
		if err := conn.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	h := open(b, config(), asker(oddPorts))
	start(b, h)
	first := once()
	const nftTableDormant = 1
	var with, without time.Duration
	var n int
	for b.Loop() {
		for range 50 {
			with += once()
		}
		dormant(nftTableDormant)
		for range 50 {
			without += once()
		}
		dormant(0)
		n += 50
	}
	b.ReportMetric(float64(with.Microseconds())/float64(n), "µs/with")
	b.ReportMetric(float64(without.Microseconds())/float64(n), "µs/without")
	b.ReportMetric(float64(with)/float64(without), "ratio")
	b.ReportMetric(float64(first.Microseconds()), "µs/first")
}
