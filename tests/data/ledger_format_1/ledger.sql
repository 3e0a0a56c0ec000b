BEGIN TRANSACTION;
CREATE TABLE asked (round INTEGER, position INTEGER, device TEXT, PRIMARY KEY (round, device));
INSERT INTO "asked" VALUES(1,0,'device-0');
INSERT INTO "asked" VALUES(1,1,'device-1');
INSERT INTO "asked" VALUES(2,0,'device-0');
INSERT INTO "asked" VALUES(2,1,'device-1');
CREATE TABLE costs (round INTEGER PRIMARY KEY, bytes_down INTEGER, bytes_up INTEGER, bytes_sent INTEGER,
                    bytes_received INTEGER, seconds REAL);
INSERT INTO "costs" VALUES(0,0,0,529,595,1.0);
INSERT INTO "costs" VALUES(1,0,178,2718,1385,3.0);
INSERT INTO "costs" VALUES(2,684,89,2571,912,4.0);
CREATE TABLE evaluations (version INTEGER, device TEXT, loss REAL, accuracy REAL, num_samples INTEGER,
                          PRIMARY KEY (version, device));
INSERT INTO "evaluations" VALUES(0,'eval',1.07336641594617065997e+00,4.82307416725304083371e-01,14);
INSERT INTO "evaluations" VALUES(1,'eval',1.07170047376292609797e+00,4.82695260567109596383e-01,14);
CREATE TABLE job (format INTEGER, settings TEXT, finished REAL);
INSERT INTO "job" VALUES(1,'{"job":"job","artifact":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","rounds":2,"clients":2,"min_clients":2,"strategy":"fedavgm","work":{"policy":{"name":"full","drop":0.0,"shape":"uniform","period":0},"optimizer":{"name":"adamw","lr":0.002,"weight_decay":0.0,"warmup_steps":0,"decay":"constant","clip_norm":0.0},"steps":4,"epochs":1,"batch_size":16,"seq_len":128,"seed":0,"codec":"fp32","rounds_before":0},"seed":0,"evaluate_every":1}',NULL);
CREATE TABLE updates (round INTEGER, device TEXT, digest TEXT, num_samples INTEGER, loss REAL,
                      PRIMARY KEY (round, device));
INSERT INTO "updates" VALUES(1,'device-0','c26d7d4a5989500c9ccd67c1040a1624c7e075a218e0bec9baeafebc91dd0476',5,1.58216054340331702121e+00);
INSERT INTO "updates" VALUES(1,'device-1','f2a82c48c8331cd52e2f18e4119c07845e5571c4746cb36fe1afd9063bc42ef4',6,2.18208583771209596591e+00);
INSERT INTO "updates" VALUES(2,'device-0','2148304db51d017e337faeb3232dc68589245d6e0305a9e7112706c6147dc264',5,1.44155629282145492098e+00);
CREATE TABLE versions (version INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, memory TEXT NOT NULL);
INSERT INTO "versions" VALUES(0,'678e51760412835d12239d361f8d033d2295719453e7542e534d4cd54c9f5db3','');
INSERT INTO "versions" VALUES(1,'84934d2a559491e8b752d7ce4663bdb627a3251530ee86adb8fc5898a1822fdf','de653fbd8648f17c6c33bb30794e4a770a7f2e25d1cdfd7cb811864f7634b9c2');
COMMIT;
